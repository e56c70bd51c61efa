"""A clock of measured blocks: what each shape of layer takes on this machine, kept in a file and filled as asked.

    time of a model = rest + sum of its blocks                        (blocks.py says how each is found)

A machine's speed changes from second to second, as others use its memory and caches. Blocks that were measured one
after the other would each have seconds of their own; so all that a question needs is measured in turns (`together`),
and what counts is a mean, because means of parts add up to the mean of the whole.

One line of the file per block, keyed by all that its time depends on; between measured widths a time may be
interpolated instead of measured.

Numbers  a block's keys, values and states are in the numbers of the engine, whatever formats are planned for them.
"""

import functools
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from plait.compress.blocks import LARGE, Question, Times, about_layer, about_rest, footprint_class, read_bytes
from plait.compress.costs import Costs, Load
from plait.compress.numbers import Numbers
from plait.compress.stopwatch import Run, seconds_of
from plait.config import to_dict
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.model.plan import PIECE
from plait.train.metrics import write_whole

# share of the free memory for models that are held at once to be measured in turns
ROOM = 1 / 4

Key = dict[str, object]
Found = TypeVar("Found")


@dataclass(slots=True, kw_only=True)
class BlockLibrary:
    """A clock (see costs.py) that measures what it does not know.

    path: its file; made if it is not there. device: where models run. rounds: measurements of each block. piece: tokens
    of prompts that are read at once. footprint: bytes that a step of the models that are asked about reads, about.
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
    _wanted: dict[str, Question] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.entries = _read(self.path)

    def together(self, ask: Callable[[], Found], beside: Sequence[Run] = ()) -> tuple[Found, dict[Run, float]]:
        """What `ask` gives, after everything it asks of this clock was measured in turns; and seconds of other calls.

        Args:
            ask: called twice; the first time what is not known takes next to no time, only to see what that is.
            beside: calls to measure in the same turns.
        """
        self._wanted = wanted = {}
        try:
            ask()
        finally:
            self._wanted = None
        seconds = self._measure(wanted, beside)
        return ask(), seconds

    def layer(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> Times:
        """Seconds of prefill and of a decode step of one layer; measured now if it is not known."""
        asked = (spec, d_model, load, numbers.weights, self.footprint)
        if asked in self.told:
            return self.told[asked]
        low, high, share = knots(spec) if self.interpolates else (spec, spec, 0.0)
        below = self._layer(low, d_model, load, numbers)
        above = below if high == low else self._layer(high, d_model, load, numbers)
        found = below[0] + share * (above[0] - below[0]), below[1] + share * (above[1] - below[1])
        if self._wanted is None:
            self.told[asked] = found
        return found

    def rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> Times:
        """Seconds of everything but the layers; measured now if it is not known."""
        block = {"kind": "rest", "d_model": config.d_model, "vocab_size": config.vocab_size}
        block |= {"ties_embeddings": config.ties_embeddings, "residual_in_fp32": config.residual_in_fp32}
        return self._time(block, load, numbers, lambda **how: about_rest(config, load, numbers.weights, **how))

    def _layer(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> Times:
        block = {"kind": spec.symbol, "d_model": d_model} | to_dict(spec)
        return self._time(block, load, numbers, lambda **how: about_layer(spec, d_model, load, numbers.weights, **how))

    def _time(self, block: Key, load: Load, numbers: Numbers, question: Callable[..., Question]) -> Times:
        footprint = footprint_class(self.footprint)
        where = device_name(self.device) | {"weights": str(numbers.weights), "piece": self.piece}
        where |= {"footprint": footprint, "batch": load.batch, "context": load.context, "middle": load.middle}
        key = _text(where | {"block": block})
        if key not in self.entries:
            wanted = {key: question(footprint=footprint, piece=self.piece)}
            if self._wanted is not None:
                self._wanted |= wanted
                # next to nothing: a budget may be a part of it, and must be above 0
                return 1e-9, 1e-9
            self._measure(wanted)
        return self.entries[key]

    def _measure(self, wanted: Mapping[str, Question], beside: Sequence[Run] = ()) -> dict[Run, float]:
        each = []
        for group in list(_groups(wanted)) or ([[]] if beside else []):
            if self.on_measure is not None:
                for key in group:
                    self.on_measure(json.dumps(json.loads(key)["block"]))
            runs = [run for key in group for run in wanted[key].runs]
            seconds = seconds_of([*runs, *beside], rounds=self.rounds, device=self.device)
            each.append(seconds)
            # what others have measured meanwhile stays
            found = {key: wanted[key].answer(seconds) for key in group}
            self.entries = _read(self.path) | self.entries | found
            _write(self.path, self.entries)
        return {run: statistics.fmean(seconds[run] for seconds in each) for run in beside}


def together(costs: Costs, ask: Callable[[], Found]) -> Found:
    """What `ask` gives; if these costs have a clock that measures, all that it needs is measured in turns."""
    return costs.clock.together(ask)[0] if isinstance(costs.clock, BlockLibrary) else ask()


def _groups(wanted: Mapping[str, Question]) -> Iterator[list[str]]:
    """Keys of questions whose models fit together into memory; one that does not fit is alone."""
    group: list[str] = []
    room = ROOM * psutil.virtual_memory().available
    models: dict[object, float] = {}
    for key, question in wanted.items():
        mine = {(run.config, run.weights): _bytes(run) for run in question.runs}
        if group and sum((models | mine).values()) > room:
            yield group
            group, models = [], {}
        group.append(key)
        models |= mine
    if group:
        yield group


def _bytes(run: Run) -> float:
    return read_bytes(run.config, run.load, run.weights)


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


def _text(key: Mapping[str, object]) -> str:
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
