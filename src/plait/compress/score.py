"""Scores what every part of a model is worth, in one pass over calibration text, forward only.

Hooks keep running sums (taps.py), so memory does not grow with the text; the pass can be killed and goes on where its
state was saved last, to the same bits. The head is not computed: nothing but its weights is needed.

Source   Muralidharan et al. 2024, arXiv:2407.14679; NVIDIA 2025, arXiv:2504.03624 section 3; per axis see axes/.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plait.compress.axes import AXES
from plait.compress.axis import WHOLE, Axis, Units
from plait.compress.layers import LayerScores
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
        units = self.units.get((axis, layer))
        measure = by or AXES[axis].measures[0]
        if units is None or measure not in units.importance:
            known = sorted({name for name, _ in self.units})
            raise ValueError(
                f"axis {axis!r} of layer {layer} was not scored by {measure!r}; scored: {', '.join(known)}"
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
        tensors, facts = _read(Path(path))
        grouped: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            axis, layer, rest = name.split("/", 2)
            grouped.setdefault((axis, int(layer)), {})[rest] = tensor
        return Scores(
            units={key: _unpack(parts) for key, parts in grouped.items()},
            layers={name: tuple(values) for name, values in facts["layers"].items()},
            order=tuple(facts["order"]),
            merges={layer: (twin, factor) for layer, twin, factor in facts.get("merges", [])},
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

    Raises: ValueError for no batches, an unknown axis, a model that cannot be scored, or a state of another pass.
    """
    chosen = _chosen(axes)
    if not batches:
        raise ValueError("calibration has no batches: give more text, or shorter sequences")
    for layer, spec in enumerate(model.config.layers):
        if spec.sigma_reparam:
            raise ValueError(f"layer {layer} has sigma_reparam=true, and such layers can be neither scored nor cut")
    taps = Taps(seed=seed)
    identity = _identity(model, [axis.name for axis in chosen], seed)
    done, tokens, digest = _resume(folder, taps, batches, identity)
    try:
        for axis, where, module in _places(model, chosen):
            axis.watch(taps, where, module)
        for number in range(done, len(batches)):
            batch = batches[number].to(model.device)
            taps.begin(number, batch.ids, batch.starts)
            model.hidden(batch.ids, starts=batch.starts)
            tokens, digest = tokens + batch.ids.numel(), _chained(digest, batches[number])
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
    depth = units.pop(("depth", WHOLE), None)
    layers = {} if depth is None else {name: tuple(values.tolist()) for name, values in depth.importance.items()}
    return Scores(units=units, layers=layers, config=model.config, tokens=tokens)


def _chosen(axes: Sequence[str] | None) -> list[Axis]:
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


def _identity(model: Hybrid, axes: Sequence[str], seed: int) -> str:
    """What decides the sums besides the text: the sizes and, of every tensor, some numbers."""
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), list(axes), seed]).encode())
    for name, tensor in model.state_dict().items():
        few = tensor.detach().flatten()[:: max(tensor.numel() // 64, 1)].double().cpu()
        digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()


def _chained(digest: str, batch: Batch) -> str:
    read = batch.ids.cpu().numpy().tobytes() + batch.starts.cpu().numpy().tobytes()
    return hashlib.sha256(digest.encode() + read).hexdigest()


def _resume(folder: Path | None, taps: Taps, batches: Sequence[Batch], identity: str) -> tuple[int, int, str]:
    """Batches done, their tokens and digest; the sums of an earlier run are put into the taps."""
    if folder is None or not (folder / STATE).is_file():
        return 0, 0, ""
    tensors, facts = _read(folder / STATE)
    digest = ""
    for batch in batches[: facts["done"]]:
        digest = _chained(digest, batch)
    if facts["identity"] != identity or digest != facts["digest"]:
        raise ValueError(
            f"{folder / STATE} belongs to another model, text, seed or axes; remove it or choose another folder"
        )
    taps.sums.update(tensors)
    return facts["done"], facts["tokens"], digest


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
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, aside, metadata={"facts": json.dumps(facts)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds no scores: {type(error).__name__}: {error}; remove it and score again"
        ) from None
