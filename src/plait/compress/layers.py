"""Finds what each layer is worth by leaving it out; the least important one goes, and so on with what is left.

    mse      mean over tokens and vocabulary of (logits without the layer - the teacher's)^2
    input    mean over tokens and channels of the same difference at the head's input
    loss     mean cross-entropy without the layer - the teacher's, nats per token: the logarithm of perplexity's ratio

Layers before the one that is left out do what they did: for each layer only those behind it are run again, n / 2
passes for n layers instead of n. Logits are not formed for `mse`, since |W d|^2 = d^T (W^T W) d.

Of two twins (twins.py) the earlier one is also left out with the later one adding as much as both, and counts with the
smaller error of the two: a layer that was split in halves is worth little, though each half is worth a layer.

Numbers  differences and products in float32 (float64 for float64), sums in float64.
Source   NVIDIA 2025, arXiv:2504.03624 section 3.2 (input), arXiv:2508.14444 (mse, one after the other).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from plait.compress.twins import twin_layers
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.model.layer import Span
from plait.train.metrics import write_whole

MEASURES = ("mse", "input", "loss")
STATE = "layers.json"
# what stands behind a measure's name where a twin adds as much as both
MERGED = ", merged"
# numbers of the head's weight that are widened at a time
AT_ONCE = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScores:
    """order: layers as they went, the least important first. importance: measure -> a number per layer.

    Those of a measure are of leaving out one layer of the whole teacher. "iterative", after more than one round, is
    the place in the order; layers that never went come last, by what leaving them out of the last model did.
    merges: layer -> (its twin, by what the twin's output is multiplied when the layer goes), where that does less harm.
    """

    order: tuple[int, ...]
    importance: Mapping[str, tuple[float, ...]]
    merges: Mapping[int, tuple[int, float]] = field(default_factory=dict)


@dataclass(slots=True)
class _State:
    """Where a search stands: layers gone, batches done of this round, sums and rounds so far.

    merges: [layer, twin, factor] of those that went. offers: of those that might, as the first round found them.
    """

    order: list[int] = field(default_factory=list)
    done: int = 0
    tokens: int = 0
    counted: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    merges: list[list[float]] = field(default_factory=list)
    offers: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def score_layers(
    model: Hybrid,
    batches: Sequence[Batch],
    *,
    rounds: int = 1,
    by: str = "mse",
    measures: Sequence[str] = ("mse", "input"),
    folder: Path | None = None,
    every: int = 1,
    identity: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> LayerScores:
    """Leave out every layer in turn; each round removes the one that does least.

    Args:
        model: the teacher.
        batches: what it reads; packed rows, without padding.
        rounds: layers to remove, at least one less than there are.
        by: the measure that decides which layer goes.
        measures: those to take; `by` is always among them. "loss" costs the head for every layer.
        folder: where to keep the state, and to find that of a killed run; None keeps nothing.
        every: batches between two states.
        identity: what distinguishes this teacher from others with the same sizes, if its numbers do not.
        progress: told of batches done and in all, over all rounds.

    Raises: ValueError for no batches, an unknown measure, too many rounds, or a state of another search.
    """
    wanted = _checked(model, batches, rounds, by, measures)
    state, known = _State(), _identity(model, batches, wanted, by, identity)
    if folder is not None:
        _resume(folder / STATE, state, known)
    gram, pairs = _gram(model) if "mse" in wanted else None, twin_layers(model)
    while len(state.rounds) < rounds:
        for number in range(state.done, len(batches)):
            batch = batches[number].to(model.device)
            _leave_out(model, batch, wanted, gram, pairs, state)
            state.done, state.tokens = number + 1, state.tokens + batch.ids.numel()
            if folder is not None and (state.done % every == 0 or state.done == len(batches)):
                _save(folder / STATE, state, known)
            if progress is not None:
                progress(len(state.rounds) * len(batches) + state.done, rounds * len(batches))
        _end_round(model, state, wanted, by, pairs)
        if folder is not None:
            _save(folder / STATE, state, known)
    return _found(model, state, by, rounds)


def _checked(model: Hybrid, batches: Sequence[Batch], rounds: int, by: str, measures: Sequence[str]) -> list[str]:
    if not batches:
        raise ValueError("calibration has no batches: give more text, or shorter sequences")
    if not 1 <= rounds < len(model.blocks):
        raise ValueError(f"rounds={rounds}: between 1 and {len(model.blocks) - 1} of the layers can be removed")
    for name in (by, *measures):
        if name not in MEASURES:
            raise ValueError(f"measure {name!r} is unknown; known: {', '.join(MEASURES)}")
    return [name for name in MEASURES if name in (by, *measures)]


Pairs = Mapping[int, tuple[int, float]]


def _leave_out(
    model: Hybrid, batch: Batch, measures: Sequence[str], gram: Tensor | None, pairs: Pairs, state: _State
) -> None:
    """Add to the sums what leaving out each layer that is still there does to one batch."""
    x, span, reference = _opened(model, batch)
    kept = [i for i in range(len(model.blocks)) if i not in state.order]
    base = _loss(model, reference, batch) if "loss" in measures else 0.0
    louder = _louder(state)

    def run(layers: Sequence[int], x: Tensor, louder: Mapping[int, float]) -> Tensor:
        for layer in layers:
            y = model.blocks[layer](x, span)
            x = x + louder[layer] * (y - x) if layer in louder else y
        return x

    def add(layer: int, y: Tensor, suffix: str) -> None:
        h = model.norm(y).to(model.recipe.compute)
        wide = torch.promote_types(h.dtype, torch.float32)
        difference = (h.to(wide) - reference.to(wide)).flatten(0, 1)
        for name in measures:
            sums = state.sums.setdefault(name + suffix, [0.0] * len(model.blocks))
            if name == "loss":
                sums[layer] += _loss(model, h, batch) - base
            else:
                products = difference if name == "input" or gram is None else difference @ gram
                sums[layer] += float((products * difference).double().sum())

    for place, layer in enumerate(kept):
        rest = kept[place + 1 :]
        add(layer, run(rest, x, louder), "")
        if layer in pairs and pairs[layer][0] in rest:
            add(layer, run(rest, x, _with(louder, layer, pairs)), MERGED)
        x = run([layer], x, louder)
    state.counted += int((batch.targets != IGNORED).sum())


def _louder(state: _State) -> dict[int, float]:
    """By what the outputs of layers are multiplied whose twins went."""
    factors: dict[int, float] = {}
    for _, twin, factor in state.merges:
        factors[int(twin)] = factors.get(int(twin), 1.0) * factor
    return factors


def _with(louder: Mapping[int, float], layer: int, pairs: Pairs) -> dict[int, float]:
    twin, factor = pairs[layer]
    return {**louder, twin: louder.get(twin, 1.0) * factor}


def _opened(model: Hybrid, batch: Batch) -> tuple[Tensor, Span, Tensor]:
    """What enters the first layer, the span that all layers see, and what the whole model gives to its head."""
    seen: list[tuple[Tensor, Span]] = []

    def before(module: torch.nn.Module, args: tuple[Tensor, Span, object]) -> None:
        seen.append(args[:2])

    handle = model.blocks[0].register_forward_pre_hook(before)
    try:
        reference, _ = model.hidden(batch.ids, starts=batch.starts)
    finally:
        handle.remove()
    return *seen[0], reference


def _loss(model: Hybrid, h: Tensor, batch: Batch) -> float:
    return float(model.loss_sum(h, batch.targets))


def _gram(model: Hybrid) -> Tensor:
    """(D, D): W^T W / V of the head."""
    w = model.head_weight.detach()
    wide = torch.promote_types(w.dtype, torch.float32)
    total = torch.zeros(w.shape[1], w.shape[1], dtype=wide, device=w.device)
    for rows in w.split(max(AT_ONCE // w.shape[1], 1)):
        total += rows.to(wide).mT @ rows.to(wide)
    return total / w.shape[0]


def _end_round(model: Hybrid, state: _State, measures: Sequence[str], by: str, pairs: Pairs) -> None:
    """Turn sums into means, and take the least important layer away."""
    divisor = {"mse": state.tokens, "input": state.tokens * model.config.d_model, "loss": max(state.counted, 1)}
    means = {name: [value / divisor[name] for value in state.sums[name]] for name in measures}
    for layer, value in enumerate(means[by]):
        if not math.isfinite(value):
            raise ValueError(f"{by} without layer {layer} is {value}: the model's numbers overflow; load it in float32")
    left = [i for i in range(len(model.blocks)) if i not in state.order]
    merged = [i for i in left if i in pairs and pairs[i][0] in left and state.sums[by + MERGED][i] < state.sums[by][i]]
    for layer in merged:
        for name in measures:
            means[name][layer] = state.sums[name + MERGED][layer] / divisor[name]
    gone = min(left, key=lambda i: (means[by][i], i))
    offers = [[i, *pairs[i]] for i in merged]
    if not state.rounds:
        state.offers = offers
    state.merges += [offer for offer in offers if offer[0] == gone]
    state.order.append(gone)
    state.rounds.append(means)
    state.done, state.tokens, state.counted, state.sums = 0, 0, 0, {}


def _found(model: Hybrid, state: _State, by: str, rounds: int) -> LayerScores:
    """What so many rounds found; the state may be that of a search that went on."""
    order, importance = state.order[:rounds], {name: tuple(values) for name, values in state.rounds[0].items()}
    if rounds > 1:
        last = state.rounds[rounds - 1][by]
        rest = sorted(set(range(len(model.blocks))) - set(order), key=lambda i: (last[i], i))
        place = {layer: float(at) for at, layer in enumerate([*order, *rest])}
        importance["iterative"] = tuple(place[i] for i in range(len(model.blocks)))
    went = [merge for merge in state.merges if merge[0] in order]
    merges = {int(layer): (int(twin), factor) for layer, twin, factor in [*state.offers, *went]}
    return LayerScores(order=tuple(order), importance=importance, merges=merges)


def _identity(
    model: Hybrid, batches: Sequence[Batch], measures: Sequence[str], by: str, more: str
) -> dict[str, object]:
    digest = print_of(model, more)
    for batch in batches:
        digest = chained(digest, batch)
    return {"teacher and text": digest, "measures": list(measures), "by": by}


def print_of(model: Hybrid, *more: object) -> str:
    """What decides a model's answers: its sizes and, of every tensor, some numbers; and more, JSON-ready."""
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), *more]).encode())
    for name, tensor in model.state_dict().items():
        few = tensor.detach().flatten()[:: max(tensor.numel() // 64, 1)].double().cpu()
        digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()


def chained(digest: str, batch: Batch) -> str:
    """The print of what was read before and of a batch behind it."""
    tensors = (batch.ids, batch.starts, batch.targets)
    return hashlib.sha256(digest.encode() + b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()


def _save(path: Path, state: _State, identity: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: getattr(state, name) for name in _State.__slots__}
    write_whole(path, json.dumps({"identity": identity, **data}))


def _resume(path: Path, state: _State, identity: Mapping[str, object]) -> None:
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        same = data["identity"] == identity
        for name in _State.__slots__:
            setattr(state, name, data[name])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no state of this search ({error!r}); remove it") from None
    if not same:
        raise ValueError(f"{path} belongs to another model, text or measure; remove it or choose another folder")
