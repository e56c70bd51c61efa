"""Which models' times tell the time of one layer, or of everything but the layers: differences of calls, by formula.

    layer = ( time(host + R layers) - time(host) ) / R                host: embedding, one tiny layer, norm, small head
    head  = time(host + n wide layers, with the head) - time(host) - n / m ( time(host + m wide layers) - time(host) )
    rest  = time(host) - tiny layer + head

A small model lives in the caches of a processor and a large one does not, so layers are repeated until a step reads as
many bytes as one of the model that is asked about (`footprint`), and all of them share what that costs. The head's time
is such a mean too, and no difference of adding it: what it adds includes what it drives out of the caches, which the
layers' own times hold already.

A prompt longer than a piece is not read to its end: pieces cost the same but for the keys before them, which cost in
proportion, so the first and the last piece tell the sum.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from plait.compress.costs import Load
from plait.compress.numbers import Numbers, layer_weights, rest_weights
from plait.compress.stopwatch import Run
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.layers.mlp import MLP

TINY = MLP(d_ff=16)
HOST_VOCAB = 64
# repeats of a layer, within which the footprint is sought; prompts are bound by products, for which a few will do
LEAST, MOST = 3, 128
# tiny layers whose mean is taken off the host
TINIES = 64
# bytes that no cache holds
LARGE = 64 * 2**20
# of the engine's own numbers
HELD = Numbers(kv="bf16", ssm="fp32", conv="bf16")

Times = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """runs: calls that must be timed. answer: seconds of prefill and of a decode step, from the seconds of those."""

    runs: tuple[Run, ...]
    answer: Callable[[Mapping[Run, float]], Times]


def about_layer(
    spec: LayerSpec, d_model: int, load: Load, weights: str | float, *, footprint: float, piece: int
) -> Question:
    """What one layer takes in a model whose steps read so many bytes (`footprint`), prompts being read in pieces."""
    count = _repeats(spec, d_model, load, weights, footprint)
    host = ModelConfig(vocab_size=HOST_VOCAB, d_model=d_model, layers=(TINY,))
    few, many = (replace(host, layers=(TINY,) + (spec,) * n) for n in (LEAST, count))
    width = min(load.context, max(1, piece // load.batch))

    def reads(config: ModelConfig) -> list[Run]:
        depths = sorted({0, load.context - width})
        return [Run(config=config, weights=weights, load=load, tokens=width, depth=depth) for depth in depths]

    low, high = (Run(config=config, weights=weights, load=load) for config in (host, many))

    def answer(seconds: Mapping[Run, float]) -> Times:
        pairs = zip(reads(host), reads(few), strict=True)
        each = statistics.fmean(max(seconds[b] - seconds[a], 0.0) / LEAST for a, b in pairs)
        return load.context / width * each, max(seconds[high] - seconds[low], 0.0) / count

    return Question(runs=(low, high, *reads(host), *reads(few)), answer=answer)


def about_rest(config: ModelConfig, load: Load, weights: str | float, *, footprint: float, piece: int) -> Question:
    """What everything but the layers takes, likewise."""
    bare = replace(config, layers=(TINY,), vocab_size=HOST_VOCAB)
    wide = MLP(d_ff=4 * config.d_model)
    room, each = footprint - rest_weights(config, weights).read, step_bytes(wide, config.d_model, load, weights)
    n = min(MOST, max(0, round(room / each)))
    m = max(n, min(MOST, round(footprint / each)))
    width = min(load.context, max(1, piece // load.batch))
    more, stack = (replace(bare, layers=(TINY,) + rows) for rows in ((TINY,) * TINIES, (wide,) * m))
    headed = replace(config, layers=(TINY,) + (wide,) * n)
    a, b, c, d = (Run(config=one, weights=weights, load=load) for one in (bare, more, stack, headed))
    short, long = (Run(config=one, weights=weights, load=load, tokens=width) for one in (bare, more))

    def answer(seconds: Mapping[Run, float]) -> Times:
        layers = n / m * (seconds[c] - seconds[a]) if n else 0.0
        head = max(seconds[d] - seconds[a] - layers, 0.0)
        read, step = (seconds[low] - (seconds[high] - seconds[low]) / TINIES for low, high in ((short, long), (a, b)))
        return max(load.context / width * read, 0.0) + head, max(step, 0.0) + head

    return Question(runs=(a, b, *((c,) if n else ()), d, short, long), answer=answer)


def _repeats(spec: LayerSpec, d_model: int, load: Load, weights: str | float, footprint: float) -> int:
    return min(MOST, max(LEAST, round(footprint / step_bytes(spec, d_model, load, weights))))


def step_bytes(spec: LayerSpec, d_model: int, load: Load, weights: str | float) -> float:
    """Bytes that a decode step reads of a layer here: weights, keys and values, states."""
    cost = KINDS[spec.symbol].cost(spec, d_model)
    states = cost.ssm_numbers * HELD.ssm_bytes + cost.conv_numbers * HELD.conv_bytes
    one = cost.kv_numbers_per_token * HELD.kv_bytes * load.middle + states
    return layer_weights(spec, d_model, weights, load.batch).read + load.batch * one


def read_bytes(config: ModelConfig, load: Load, weights: str | float) -> float:
    """Bytes that a decode step of a model reads here: its footprint."""
    layers = sum(step_bytes(spec, config.d_model, load, weights) for spec in config.layers)
    return layers + rest_weights(config, weights).read


def footprint_class(n_bytes: float) -> int:
    """Half powers of two from 1 to 64 MiB: sizes between which a layer's time hardly differs."""
    halves = round(2 * math.log2(max(n_bytes, 1)))
    return round(2 ** (min(max(halves, 40), round(2 * math.log2(LARGE))) / 2))
