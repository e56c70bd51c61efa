"""Scores what every part of a model is worth, in one pass over calibration text, forward only.

Hooks keep running sums (taps.py), so memory does not grow with the text; the pass can be killed and goes on where its
state was saved last, to the same bits. The head is not computed: nothing but its weights is needed.

Source   Muralidharan et al. 2024, arXiv:2407.14679; NVIDIA 2025, arXiv:2504.03624 section 3; per axis see axes/.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.compress.axes import AXES
from plait.compress.axis import WHOLE, Axis, Units
from plait.compress.layers import LayerScores, chained, print_of
from plait.compress.taps import Taps
from plait.data.loader import Batch
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid

STATE, FILE = "sums.safetensors", "scores.safetensors"
# batches done, batches in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the parts of a teacher are worth.

    units: (axis, layer) -> Units; layer is WHOLE (-1) for the residual stream's channels.
    layers: measure -> one number per layer, larger is more important.
    order: the layers in the order in which they went when they were removed one after the other; may be shorter.
    merges: layer -> (its twin, by what the twin's output is multiplied when only the twin stays).
    config: the teacher. tokens: that were read.
    """

    units: Mapping[tuple[str, int], Units]
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    merges: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    config: ModelConfig
    tokens: int

    def of(self, axis: str, layer: int = WHOLE, by: str | None = None) -> Tensor:
        """Importance of the units of an axis in a layer.

        Args:
            axis: a name from AXES. layer: of the teacher, WHOLE for "width".
            by: the measure; None for the axis' usual one.

        Returns: (units,) or (groups, units of each) float64.
        Raises: ValueError if it was not scored.
        """
        (row,) = chosen_axes([axis])
        units, measure = self.units.get((axis, layer)), by or row.measures[0]
        if units is None:
            known = sorted({name for name, _ in self.units})
            raise ValueError(f"axis {axis!r} of layer {layer} was not scored; scored: {', '.join(known)}")
        if measure not in units.importance:
            raise ValueError(
                f"axis {axis!r} was not scored by {measure!r}; its measures: {', '.join(units.importance)}"
            )
        return units.importance[measure]

    def with_layers(self, found: LayerScores) -> "Scores":
        """The same with what removing layers did."""
        return replace(self, layers={**self.layers, **found.importance}, order=found.order, merges=found.merges)

    def save(self, path: Path | str) -> None:
        """Write them to one file, which appears whole or not at all."""
        tensors = {
            f"{axis}/{layer}/{name}": tensor
            for (axis, layer), units in self.units.items()
            for name, tensor in _pack(units).items()
        }
        facts = {"layers": self.layers, "order": self.order, "config": self.config.to_dict(), "tokens": self.tokens}
        merges = [[layer, *merge] for layer, merge in self.merges.items()]
        _write(Path(path), tensors, {**facts, "merges": merges})

    @staticmethod
    def load(path: Path | str) -> "Scores":
        """Read what `save` wrote.

        Raises: ValueError naming the file if it is no such file.
        """
        with _reading(Path(path)) as (tensors, facts):
            grouped: dict[tuple[str, int], dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                axis, layer, rest = name.split("/", 2)
                grouped.setdefault((axis, int(layer)), {})[rest] = tensor
            return Scores(
                units={key: _unpack(parts) for key, parts in grouped.items()},
                layers={name: tuple(values) for name, values in facts["layers"].items()},
                order=tuple(facts["order"]),
                merges={layer: (twin, factor) for layer, twin, factor in facts["merges"]},
                config=ModelConfig.from_dict(facts["config"]),
                tokens=facts["tokens"],
            )


@torch.no_grad()
def score(
    model: Hybrid,
    batches: Sequence[Batch],
    *,
    folder: Path | None = None,
    every: int = 16,
    axes: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score all axes in one pass.

    Args:
        model: the teacher, with plain weights.
        batches: what it reads; packed rows, without padding.
        folder: where to keep the state of an unfinished pass, and to find it; None keeps nothing.
        every: batches between two states.
        axes: names from AXES; None for all.
        seed: of the random numbers in sketches and state scores.
        progress: told of batches done and in all.

    Raises: ValueError for no batches, an unknown axis, a model that cannot be scored or whose numbers overflow, or a
        state of another pass.
    """
    chosen = chosen_axes(axes)
    if not batches:
        raise ValueError("calibration has no batches: give more text, or shorter sequences")
    for layer, spec in enumerate(model.config.layers):
        if spec.sigma_reparam:
            raise ValueError(f"layer {layer} has sigma_reparam=true, and such layers can be neither scored nor cut")
    taps = Taps(seed=seed)
    identity = print_of(model, [axis.name for axis in chosen], seed)
    done, tokens, digest = _resume(folder, taps, batches, identity)
    try:
        for axis, where, module in _places(model, chosen):
            axis.watch(taps, where, module)
        for number in range(done, len(batches)):
            batch = batches[number].to(model.device)
            taps.begin(number, batch.ids, batch.starts)
            model.hidden(batch.ids, starts=batch.starts)
            tokens, digest = tokens + batch.ids.numel(), chained(digest, batches[number])
            if folder is not None and (number + 1 == len(batches) or (number + 1) % every == 0):
                facts = {"done": number + 1, "tokens": tokens, "digest": digest, "identity": identity}
                _write(folder / STATE, taps.sums, facts)
            if progress is not None:
                progress(number + 1, len(batches))
    finally:
        taps.close()
    units = {
        (axis.name, int(where.split(".")[1]) if where else WHOLE): axis.find(taps.sums, where, module, tokens)
        for axis, where, module in _places(model, chosen)
    }
    _check_finite(units)
    depth = units.pop(("depth", WHOLE), None)
    layers = {} if depth is None else {name: tuple(values.tolist()) for name, values in depth.importance.items()}
    # such as the neurons of a shared expert where there is none
    units = {key: found for key, found in units.items() if found.importance}
    return Scores(units=units, layers=layers, config=model.config, tokens=tokens)


def _check_finite(units: Mapping[tuple[str, int], Units]) -> None:
    for (axis, layer), found in units.items():
        for by, values in found.importance.items():
            if not bool(values.isfinite().all()):
                where = "the model" if layer == WHOLE else f"layer {layer}"
                raise ValueError(
                    f"axis {axis!r} of {where} has scores by {by!r} that are no numbers: "
                    "its activations overflow; load the model in float32"
                )


def chosen_axes(axes: Iterable[str] | None) -> list[Axis]:
    """Rows of the table by name, in its order; all of them for None.

    Raises: ValueError for an unknown one.
    """
    axes = None if axes is None else list(axes)
    for name in axes or ():
        if name not in AXES:
            raise ValueError(f"axis {name!r} is unknown; known: {', '.join(AXES)}")
    return [axis for name, axis in AXES.items() if axes is None or name in axes]


def _places(model: Hybrid, axes: Sequence[Axis]) -> list[tuple[Axis, str, nn.Module]]:
    """Each axis with each layer that has it, or with the model."""
    found: list[tuple[Axis, str, nn.Module]] = []
    for axis in axes:
        if not axis.symbol:
            found.append((axis, "", model))
        for i, spec in enumerate(model.config.layers):
            if spec.symbol == axis.symbol:
                found.append((axis, f"blocks.{i}", model.blocks[i]))
    return found


def _resume(folder: Path | None, taps: Taps, batches: Sequence[Batch], identity: str) -> tuple[int, int, str]:
    """Batches done, their tokens and digest; the sums of an earlier run are put into the taps."""
    if folder is None or not (folder / STATE).is_file():
        return 0, 0, ""
    with _reading(folder / STATE) as (tensors, facts):
        done, tokens, told = facts["done"], facts["tokens"], (facts["identity"], facts["digest"])
    digest = ""
    for batch in batches[:done]:
        digest = chained(digest, batch)
    if told != (identity, digest):
        raise ValueError(
            f"{folder / STATE} belongs to another model, text, seed or axes; remove it or choose another folder"
        )
    taps.sums.update(tensors)
    return done, tokens, digest


def _pack(units: Units) -> dict[str, Tensor]:
    packed = {f"importance/{name}": tensor for name, tensor in units.importance.items()}
    packed |= {f"power/{name}": tensor for name, tensor in units.power.items()}
    if units.leader is not None and units.factor is not None:
        packed |= {"leader": units.leader, "factor": units.factor}
    return packed


def _unpack(parts: Mapping[str, Tensor]) -> Units:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in parts.items() if name.startswith(prefix)}

    leader, factor = parts.get("leader"), parts.get("factor")
    return Units(importance=below("importance/"), power=below("power/"), leader=leader, factor=factor)


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name is always the same, so that kills while writing leave one such file at most
    aside = path.with_name(f".{path.name}.tmp")
    try:
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, aside, metadata={"facts": json.dumps(facts)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Tensor], dict]]:
    """Tensors and facts of a file, for whoever makes something of them; what fails meanwhile is the file's fault."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield tensors, facts
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no scores: {type(error).__name__}: {error}; remove it and score again"
        ) from None
