"""Measures how long a model takes here to read prompts and to decode a token, run as the engine runs it.

A prompt is read in pieces, as the engine reads it; a decode step begins at a cache that holds so many tokens of random
keys and values (speed depends on how much there is to read, not on what it says). On a GPU steps are not captured as
graphs here, so that small models seem slower than the engine decodes them. Several models are measured in turns,
because a machine's speed drifts, and a difference of two times is only as good as their common ground: their caches are
warmed by steps that do not count.

Numbers  seconds: of the processor where one thread computes on it, which other programs disturb less; else of the wall.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.compress.costs import Load
from plait.compress.numbers import format_of
from plait.config import ConfigError
from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.plan import PIECE
from plait.precision.recipe import ALWAYS_FLOAT32

# steps in a measurement, and measurements for one of a prompt: steps are short, so that more of them cost nothing
STEPS, STEP_ROUNDS = 8, 2
# steps before those, and seconds after which it is enough of them: another model has run meanwhile, and a cache of many
# megabytes takes a dozen passes until it holds what it can hold of this one
WARM, WARM_S = 12, 0.015
# share of the measurements that counts as disturbed at either end
DISTURBED = 1 / 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A call to be timed: a step of decoding under a load, or so many `tokens` of each prompt behind `depth` others.

    config, weights: of the model, and in which numbers it is held. is_whole: all of the prompts, up to first logits.
    """

    config: ModelConfig
    weights: str | float
    load: Load
    tokens: int = 0
    depth: int = 0
    is_whole: bool = False


def ready(config: ModelConfig, weights: str | float, device: str | torch.device = "cpu", seed: int = 0) -> Hybrid:
    """A model of random weights that is held in these numbers, as a checkpoint would be loaded.

    Raises: ConfigError for numbers in which nothing is computed here.
    """
    form = format_of(weights)
    try:
        model = build(config, str(form), device=device, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"weights={weights!r}: no time can be measured in these numbers; {error}") from None
    for name, parameter in model.named_parameters():
        if not name.endswith(ALWAYS_FLOAT32):
            parameter.data = parameter.to(model.recipe.compute)
    return model.requires_grad_(False).eval()


def filled(model: Hybrid, depth: int, batch: int = 1, seed: int = 0) -> Cache:
    """A cache of `batch` sequences that holds `depth` tokens of random keys and values, with states of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    cache = model.cache(batch)
    if depth == 0:
        return cache
    # two real tokens, so that every layer has its shapes
    with torch.inference_mode():
        model(torch.zeros(batch, 2, dtype=torch.int64, device=model.device), cache=cache, n_logits=1)
    tensors = {}
    for name, t in cache.tensors().items():
        if name.endswith((".k", ".v")):
            shape = (*t.shape[:2], depth, t.shape[3])
            tensors[name] = torch.randn(shape, generator=generator).to(t)
        else:
            tensors[name] = t
    tensors["lengths"] = torch.full_like(cache.lengths, depth)
    cache.replace(tensors, depth)
    return cache


def seconds_of(runs: Iterable[Run], *, rounds: int, device: str = "cpu") -> dict[Run, float]:
    """How long each call takes, all of them in turns; `rounds` of prompts, and twice as many of steps."""
    runs = dict.fromkeys(runs)
    named = dict.fromkeys((run.config, run.weights) for run in runs)
    models = {name: ready(*name, device=device, seed=seed) for seed, name in enumerate(named)}
    is_read = {run: run.is_whole or run.tokens > 0 for run in runs}
    kinds = [run for run in runs if is_read[run]], [run for run in runs if not is_read[run]]

    def read(run: Run) -> Callable[[], float]:
        model = models[run.config, run.weights]
        if run.is_whole:
            return prompts(model, run.load)
        return one_piece(model, run.load.batch, run.tokens, run.depth, n_logits=0)

    def step(run: Run) -> Callable[[], float]:
        return steps(models[run.config, run.weights], run.load, rounds=_calls(rounds))

    found = _both([read(run) for run in kinds[0]], [step(run) for run in kinds[1]], rounds)
    return dict(zip((*kinds[0], *kinds[1]), found, strict=True))


def _both(reads: list[Callable[[], float]], steps: list[Callable[[], float]], rounds: int) -> list[float]:
    """Typical seconds of sides of both kinds, in turns with each other, those of steps more often."""
    found = in_turns(reads + steps * STEP_ROUNDS, rounds)
    read, rest = found[: len(reads)], found[len(reads) :]
    each = [sum(rest[i :: len(steps)], []) for i in range(len(steps))]
    return [typical(values) for values in read + each]


def _calls(rounds: int) -> int:
    """Calls of a side of steps in so many turns, but for the one that `steps` makes room for itself."""
    return STEP_ROUNDS * (rounds + 1) - 1


def typical(seconds: Sequence[float]) -> float:
    """The mean without the least and the most disturbed: means of parts add up, which medians do not."""
    ordered, out = sorted(seconds), int(DISTURBED * len(seconds))
    return statistics.fmean(ordered[out : len(ordered) - out])


def in_turns(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of each side, `rounds` times in turns, after one turn that does not count."""
    found: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, values in zip(sides, found, strict=True):
            seconds = side()
            if turn:
                values.append(seconds)
    return found


def steps(model: Hybrid, load: Load, *, rounds: int, count: int = STEPS) -> Callable[[], float]:
    """A side: mean seconds of a decode step, over `count` of them; all rounds together lie around the load's middle."""
    total = (rounds + 1) * (WARM + count)
    depth = max(load.middle - total // 2, 2)
    cache = filled(model, depth, load.batch)
    cache.reserve(depth + total)
    ids = _ids(model, load.batch, 1)

    @torch.inference_mode()
    def side() -> float:
        begun = _now(model)
        for _ in range(WARM):
            model(ids, cache=cache, n_logits=1)
            if _now(model) - begun > WARM_S:
                break
        begun = _now(model)
        for _ in range(count):
            model(ids, cache=cache, n_logits=1)
        return (_now(model) - begun) / count

    return side


def prompts(model: Hybrid, load: Load, *, piece: int = PIECE) -> Callable[[], float]:
    """A side: seconds to read all prompts of a load into an empty cache, up to the logits of the first answer token."""
    ids, width = _ids(model, load.batch, load.context), max(1, piece // load.batch)

    @torch.inference_mode()
    def side() -> float:
        cache = model.cache(load.batch)
        cache.reserve(load.tokens)
        begun = _now(model)
        for first in range(0, load.context, width):
            is_last = first + width >= load.context
            model(ids[:, first : first + width], cache=cache, n_logits=1 if is_last else 0)
        return _now(model) - begun

    return side


def one_piece(model: Hybrid, batch: int, width: int, depth: int, *, n_logits: int) -> Callable[[], float]:
    """A side: seconds to read `width` tokens of each sequence behind `depth` others, always the same ones."""
    ids, kept = _ids(model, batch, width), filled(model, depth, batch)
    tensors = {name: t.clone() for name, t in kept.tensors().items()}

    @torch.inference_mode()
    def side() -> float:
        cache = model.cache(batch)
        if depth:
            cache.replace({name: t.clone() for name, t in tensors.items()}, depth)
        cache.reserve(depth + width)
        begun = _now(model)
        model(ids, cache=cache, n_logits=n_logits)
        return _now(model) - begun

    return side


def _ids(model: Hybrid, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _now(model: Hybrid) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
