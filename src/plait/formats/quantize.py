"""Quantises a checkpoint's weights to int8, int4 or ternary codes as they are read, a few rows or a weight at a time.

    tensors of the source  ->  the same names, but codes, scales (and zero points) in place of each quantised weight

Nothing happens until a tensor is read, so loading needs the memory of the result, and writing none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from plait.formats.error import CheckpointError
from plait.formats.format import Contents
from plait.formats.tensors import LazyTensor, Run
from plait.formats.ternary import ternary_parts
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.ops.quant import quantize_groups
from plait.precision.reading import needed
from plait.precision.recipe import ALWAYS_FLOAT32, PrecisionRecipe
from plait.precision.ternary_packed import TernaryLinear
from plait.precision.weight_only import CODED, WeightOnlyLinear

C = TypeVar("C", bound=Contents)

# weights quantised at a time
_AT_ONCE = 4 << 20


def holds_codes(contents: Contents) -> bool:
    """Whether its weights are codes already."""
    return any(name.endswith(".codes") for name in contents.tensors)


def extends(held: str, recipe: PrecisionRecipe) -> bool:
    """Whether codes of one recipe serve another: the same, and more of what was high."""
    return held == "ternary-packed" and recipe.name == "ternary-packed-int8"


def quantized(contents: C, recipe: PrecisionRecipe, dtype: torch.dtype | None = None) -> C:
    """A checkpoint whose weights are held as a weight-only recipe says.

    Args:
        contents: a checkpoint in high precision.
        recipe: with codes.
        dtype: of everything that stays high; None for the recipe's compute dtype.

    Raises: CheckpointError if it holds other codes already, or weights that were never ternary are to become so; on
        reading, for a weight that no scale can hold.
    """
    if holds_codes(contents) and not extends(contents.config.recipe, recipe):
        raise CheckpointError(
            f"the weights are {contents.config.recipe} codes already and cannot become {recipe.name}; "
            "take the checkpoint that they were made from"
        )
    with torch.device("meta"):
        model = Hybrid(contents.config, recipe)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightOnlyLinear)}
    _check_ternary(contents.config, recipe, any(isinstance(layer, TernaryLinear) for layer in layers.values()))
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in contents.tensors.items():
        base, _, part = name.rpartition(".")
        layer, wide = layers.get(base), dtype or recipe.compute
        if isinstance(layer, TernaryLinear) and part in ("weight", "bias"):
            tensors |= dict(ternary_parts(base, part, tensor, layer, wide))
        elif layer is not None and part == "weight":
            tensors |= dict(_coded(base, tensor, layer))
        elif name.endswith(CODED):
            tensors[name] = tensor
        else:
            tensors[name] = tensor.cast(torch.float32 if name.endswith(ALWAYS_FLOAT32) else wide)
    if contents.config.ties_embeddings and "head" in layers:
        tensors |= dict(_coded("head", contents.tensors["embed.weight"], layers["head"]))
    return replace(contents, config=replace(contents.config, recipe=needed(recipe)), tensors=tensors)


def _check_ternary(config: ModelConfig, recipe: PrecisionRecipe, is_ternary: bool) -> None:
    if is_ternary and not config.recipe.startswith("ternary"):
        raise CheckpointError(
            f"the weights were trained in {config.recipe!r} and would be lost in {recipe.name!r}: a ternary model is "
            "trained as one; train with precision 'ternary', or take 'int4'"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """A weight's rows as codes.

    small: scales and zero points that came with the codes, until they are asked for. given: what was, by first row.
    """

    name: str
    weight: LazyTensor
    bits: int
    group: int
    zeros: bool
    small: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    given: set[tuple[int, str]] = field(default_factory=set)

    def part(self, row: int, n_rows: int, part: str) -> Tensor:
        """The numbers of one part of some rows, flat."""
        self.given.add((row, part))
        kept = self.small.pop((row, part), None)
        if kept is not None:
            return kept
        try:
            found = quantize_groups(self.weight.rows(row, n_rows).read(), self.bits, self.group, self.zeros)
        except ValueError as error:
            raise CheckpointError(f"tensor {self.name!r}: {error}") from error
        parts = {key: t.flatten() for key, t in zip(("codes", "scales", "zeros"), found, strict=True) if t is not None}
        wanted = [key for key in parts if key != "codes" and (row, key) not in self.given]
        self.small.update({(row, key): parts[key] for key in wanted})
        return parts[part]


@dataclass(frozen=True, slots=True)
class _Part:
    """A source of some rows' codes, scales or zero points."""

    rows: _Rows
    row: int
    n_rows: int
    part: str

    def read(self, start: int, count: int) -> Tensor:
        return self.rows.part(self.row, self.n_rows, self.part)[start : start + count]

    def drop(self, start: int, count: int) -> None:
        """Nothing to do: what was read is the reader's."""


def _coded(name: str, weight: LazyTensor, layer: WeightOnlyLinear) -> Iterator[tuple[str, LazyTensor]]:
    """The lazy parts of one quantised weight, by their names."""
    height, width = weight.shape
    rows = _Rows(f"{name}.weight", weight, layer.bits, layer.group, layer.zeros is not None)
    step = max(1, _AT_ONCE // width)
    for part in ("codes", "scales", "zeros"):
        like = getattr(layer, part)
        if like is None:
            continue
        each = like.shape[1]
        heights = {row: min(step, height - row) for row in range(0, height, step)}
        runs = tuple(Run(_Part(rows, row, n, part), 0, n * each) for row, n in heights.items())
        yield f"{name}.{part}", LazyTensor(shape=tuple(like.shape), dtype=like.dtype, runs=runs)
