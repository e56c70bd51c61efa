"""A clock of measured blocks: what each shape of layer takes on this machine, kept in a file and filled as asked.

    block = ( time(host + R blocks) - time(host) ) / R          host: embedding, one tiny layer, norm, a small head
    rest  = time(host) - tiny layer + head; the head is a difference too, among layers that fill the caches
    time of a model = rest + sum of its blocks

A small model lives in the caches of a processor and a large one does not, so blocks are repeated until they take as
many bytes as the models that are asked about (`footprint`); beyond the last cache nothing changes any more.

A prompt longer than a piece is not read to its end: pieces cost the same but for the keys before them, which cost in
proportion, so the first and the last piece tell the sum. One line of the file per block, keyed by all that its time
depends on; between measured widths a time may be interpolated instead of measured.

Numbers  a block's keys, values and states are in the numbers of the engine, whatever formats are planned for them.
"""

import functools
import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from plait.compress.costs import Load
from plait.compress.numbers import Numbers, layer_weights, rest_weights
from plait.compress.stopwatch import STEP_ROUNDS, in_turns, one_piece, ready, steps
from plait.config import to_dict
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.model.layer import LayerSpec
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.model.plan import PIECE
from plait.train.metrics import write_whole

TINY = MLP(d_ff=16)
HOST_VOCAB = 64
# repeats of a block, within which the footprint is sought; prompts are bound by products, for which a few will do
LEAST, MOST = 3, 64
# bytes that no cache holds
LARGE = 64 * 2**20

Times = tuple[float, float]
Key = dict[str, object]


@dataclass(slots=True, kw_only=True)
class BlockLibrary:
    """A clock (see costs.py) that measures what it does not know.

    path: its file; made if it is not there. device: where models run. rounds: measurements of each block. piece: tokens
    of prompts that are read at once. footprint: bytes of weights of the models that are asked about, about.
    interpolates: measure only some widths (see `knots`), and answer for those between them in a straight line.
    on_measure: called with the words for each block before it is measured.
    """

    path: Path
    device: str = "cpu"
    rounds: int = 5
    piece: int = PIECE
    footprint: float = LARGE
    interpolates: bool = False
    on_measure: Callable[[str], None] | None = None
    entries: dict[str, Times] = field(default_factory=dict, init=False)
    told: dict[object, Times] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.entries = _read(self.path)

    def layer(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> Times:
        """Seconds of prefill and of a decode step of one layer; measured now if it is not known."""
        asked = (spec, d_model, load, numbers.weights, self.footprint)
        if asked not in self.told:
            low, high, share = knots(spec) if self.interpolates else (spec, spec, 0.0)
            below = self._measured(low, d_model, load, numbers)
            above = below if high == low else self._measured(high, d_model, load, numbers)
            self.told[asked] = below[0] + share * (above[0] - below[0]), below[1] + share * (above[1] - below[1])
        return self.told[asked]

    def rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> Times:
        """Seconds of everything but the layers; measured now if it is not known."""
        block = {"kind": "rest", "d_model": config.d_model, "vocab_size": config.vocab_size}
        block |= {"ties_embeddings": config.ties_embeddings, "residual_in_fp32": config.residual_in_fp32}
        key = self._key(block, load, numbers)
        return self.entries.get(_text(key)) or self._keep(key, lambda: self._rest(config, load, numbers))

    def _key(self, block: Mapping[str, object], load: Load, numbers: Numbers) -> Key:
        where = device_name(self.device) | {"weights": str(numbers.weights), "piece": self.piece}
        where["footprint"] = footprint_class(self.footprint)
        return where | {"batch": load.batch, "context": load.context, "middle": load.middle, "block": dict(block)}

    def _keep(self, key: Key, measured: Callable[[], Times]) -> Times:
        if self.on_measure is not None:
            self.on_measure(json.dumps(key["block"]))
        times = measured()
        # what others have measured meanwhile stays
        self.entries = _read(self.path) | self.entries | {_text(key): times}
        _write(self.path, self.entries)
        return times

    def _measured(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> Times:
        block = {"kind": spec.symbol, "d_model": d_model} | to_dict(spec)
        key = self._key(block, load, numbers)
        return self.entries.get(_text(key)) or self._keep(key, lambda: self._block(spec, d_model, load, numbers))

    def _block(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> Times:
        size = layer_weights(spec, d_model, numbers.weights).read
        count = min(MOST, max(LEAST, round(footprint_class(self.footprint) / size)))
        host = ModelConfig(vocab_size=HOST_VOCAB, d_model=d_model, layers=(TINY,))
        few, many = (replace(host, layers=(TINY,) + (spec,) * n) for n in (LEAST, count))
        return self._prefill(host, few, LEAST, load, numbers), self._decode(host, many, count, load, numbers)

    def _rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> Times:
        bare = replace(config, layers=(TINY,), vocab_size=HOST_VOCAB)
        more = replace(bare, layers=(TINY,) * (1 + MOST))
        width = min(load.context, max(1, self.piece // load.batch))
        low, high = self._steps(self._models(bare, more, numbers), load)
        one, many = (one_piece(m, load.batch, width, 0, n_logits=0) for m in self._models(bare, more, numbers))
        short, long = map(statistics.median, in_turns([one, many], self.rounds))
        overhead = short - (long - short) / MOST, low - (high - low) / MOST
        head = self._head(config, load, numbers)
        return max(load.context / width * overhead[0], 0.0) + head, max(overhead[1], 0.0) + head

    def _head(self, config: ModelConfig, load: Load, numbers: Numbers) -> float:
        """Seconds of the head, for one token of each sequence, among layers that take what the footprint leaves."""
        wide = MLP(d_ff=4 * config.d_model)
        room = footprint_class(self.footprint) - rest_weights(config, numbers.weights).read
        count = round(room / layer_weights(wide, config.d_model, numbers.weights).read)
        among = replace(config, layers=(TINY,) + (wide,) * min(MOST, max(count, 0)))
        low, high = self._steps(self._models(replace(among, vocab_size=HOST_VOCAB), among, numbers), load)
        return max(high - low, 0.0)

    def _decode(self, host: ModelConfig, whole: ModelConfig, count: int, load: Load, numbers: Numbers) -> float:
        low, high = self._steps(self._models(host, whole, numbers), load)
        return max((high - low) / count, 0.0)

    def _steps(self, models: tuple[Hybrid, Hybrid], load: Load) -> tuple[float, float]:
        rounds = STEP_ROUNDS * self.rounds
        low, high = in_turns([steps(model, load, rounds=rounds) for model in models], rounds)
        return statistics.median(low), statistics.median(high)

    def _prefill(self, host: ModelConfig, whole: ModelConfig, count: int, load: Load, numbers: Numbers) -> float:
        width = min(load.context, max(1, self.piece // load.batch))
        models, each = self._models(host, whole, numbers), []
        for depth in sorted({0, load.context - width}):
            low, high = in_turns([one_piece(m, load.batch, width, depth, n_logits=0) for m in models], self.rounds)
            each.append(max((statistics.median(high) - statistics.median(low)) / count, 0.0))
        return load.context / width * statistics.fmean(each)

    def _models(self, host: ModelConfig, whole: ModelConfig, numbers: Numbers) -> tuple[Hybrid, Hybrid]:
        return ready(host, numbers.weights, self.device), ready(whole, numbers.weights, self.device, seed=1)


def knots(spec: LayerSpec) -> tuple[LayerSpec, LayerSpec, float]:
    """The two widths that are measured around a layer's own, and its share of the way from the first to the second.

    Hidden widths of feed-forward layers and experts, heads of Mamba-2: 1, 2, 3, 4, 6, 8, 12, ... times a unit, which
    is a group of heads, or what of 64 divides a hidden width. They follow from the width alone and not from what is
    known, so that the answers of a search do not depend on the order of its questions. Other kinds are measured.
    """
    if isinstance(spec, Mamba2):
        name, unit = "n_heads", spec.n_groups
    elif isinstance(spec, MLP | MoE):
        name, unit = "d_ff", math.gcd(spec.d_ff, 64)
    else:
        return spec, spec, 0.0
    times = getattr(spec, name) // unit
    octave = 2 ** (times.bit_length() - 1)
    places = sorted({octave, octave * 3 // 2, 2 * octave})
    low, high = max(p for p in places if p <= times), min(p for p in places if p >= times)
    share = (times - low) / (high - low) if high > low else 0.0
    return replace(spec, **{name: low * unit}), replace(spec, **{name: high * unit}), share  # type: ignore[arg-type]


def device_name(device: str) -> dict[str, object]:
    """What a time depends on besides the model: the processor or GPU, its threads, torch."""
    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": 0, "torch": torch.__version__}
    return {"device": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())


def footprint_class(n_bytes: float) -> int:
    """Half powers of two from 1 to 64 MiB: sizes between which a block's time hardly differs."""
    halves = round(2 * math.log2(max(n_bytes, 1)))
    return round(2 ** (min(max(halves, 40), round(2 * math.log2(LARGE))) / 2))


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path) -> dict[str, Times]:
    entries = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            entries[_text(row["key"])] = (float(row["prefill_s"]), float(row["decode_s"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is no measured block ({error!r}); remove the file") from None
    return entries


def _write(path: Path, entries: Mapping[str, Times]) -> None:
    rows = ({"key": json.loads(text), "prefill_s": p, "decode_s": d} for text, (p, d) in sorted(entries.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
