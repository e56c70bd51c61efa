"""Scores that look at no text: how large a unit's weights are, or numbers drawn at random. For comparison only.

magnitude of a unit = root of the sum of squares of the weights that only it has;   of a layer: of all its matrices,
over the root of how many they are
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from plait.compress.axis import Units
from plait.compress.dims import OUTSIDE, mamba2_rows, places
from plait.compress.score import Scores
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.layers.mamba2 import Mamba2

# which entries of which labelled dimension (dims.py) belong to the units of an axis
LABELS = {
    "ffn": "ffn",
    "mamba_heads": "inner",
    "mamba_channels": "inner",
    "attention_heads": "q",
    "kv_heads": "kv",
    "experts": "experts",
    "shared_ffn": "shared",
}


def magnitudes(tensors: Mapping[str, LazyTensor], config: ModelConfig, like: Scores) -> Scores:
    """Scores of the same units by the size of their weights.

    Args:
        tensors: of a checkpoint, by our names. config: its sizes.
        like: scores of it, whose units are to be given others.

    Returns: scores for `prune(..., merge=False, rescale=False)`; `layers` has the one measure "magnitude".
    """
    held: dict[str, Tensor] = {}

    def squares(name: str, dim: int) -> Tensor:
        if name not in held:
            held.clear()
            held[name] = tensors[name].read().double().square()
        square = held[name]
        return square.flatten() if square.dim() == 1 else square.sum([d for d in range(square.dim()) if d != dim])

    units = {}
    for (axis, layer), old in like.units.items():
        shape = next(iter(old.importance.values())).shape
        units[axis, layer] = _of(old, _unit_squares(axis, layer, config, shape, tensors, squares).sqrt())
    layers = tuple(_layer(tensors, i) for i in range(len(config.layers)))
    return replace(like, units=units, layers={"magnitude": layers}, order=())


def chances(like: Scores, seed: int) -> Scores:
    """Scores of the same units, drawn uniformly from 0 .. 1; `layers` has the one measure "random"."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    units = {key: _of(like.units[key], draw(tuple(_shape(like.units[key])))) for key in sorted(like.units)}
    layers = tuple(draw((len(like.config.layers),)).tolist())
    return replace(like, units=units, layers={"random": layers}, order=())


def _unit_squares(axis, layer, config, shape, tensors, squares) -> Tensor:  # noqa: ANN001
    """Sums of squares per unit, in the shape that the axis has them in."""
    if axis == "width":
        found = [
            (name, dim) for name, labels in OUTSIDE.items() for dim, label in enumerate(labels) if label == "width"
        ]
        for i, spec in enumerate(config.layers):
            found += [(f"blocks.{i}.{name}", dim) for name, dim in places(spec.symbol, "width")]
        return _total(found, tensors, squares).view(shape)
    spec = config.layers[layer]
    if axis == "ssm_state":
        assert isinstance(spec, Mamba2)
        rows = squares(f"blocks.{layer}.mixer.in_proj.weight", 0)[2 * spec.d_inner : -spec.n_heads]
        # of B and of C, each group's states
        return rows.view(2, *shape).sum(0)
    found = [(f"blocks.{layer}.{name}", dim) for name, dim in places(spec.symbol, LABELS[axis])]
    total = _total(found, tensors, squares)
    if isinstance(spec, Mamba2):
        x = mamba2_rows(spec, *(torch.arange(n) for n in (spec.d_inner, spec.n_groups * spec.d_state, spec.n_heads)))
        read = squares(f"blocks.{layer}.mixer.in_proj.weight", 0)[x["in"]]
        total = total + read[: spec.d_inner] + read[spec.d_inner : 2 * spec.d_inner]
        if axis == "mamba_channels":
            return total.view(spec.n_heads, spec.head_dim).sum(0).view(shape)
    return total.view(*shape, -1).sum(-1)


def _total(found, tensors, squares) -> Tensor:  # noqa: ANN001
    return torch.stack([squares(name, dim) for name, dim in found if name in tensors]).sum(0)


def _layer(tensors: Mapping[str, LazyTensor], layer: int) -> float:
    total, count = 0.0, 0
    for name, tensor in tensors.items():
        if name.startswith(f"blocks.{layer}.") and len(tensor.shape) >= 2:
            t = tensor.read().double()
            total, count = total + float(t.square().sum()), count + t.numel()
    return (total / max(count, 1)) ** 0.5


def _shape(units: Units) -> torch.Size:
    return next(iter(units.importance.values())).shape


def _of(old: Units, importance: Tensor) -> Units:
    return replace(old, importance=dict.fromkeys(old.importance, importance), leader=None, factor=None)
