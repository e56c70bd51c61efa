"""Ternary weights of a checkpoint as packed codes, and packed codes as masters again; computed as they are read.

    masters -> codes     absmean rounding of the whole weight (or each segment of a fused one), as training does it
    codes -> masters     W = a * code, and a tiny number z where the code is 0, such that mean |W| is the scale again:
                         a = scale n / n1, for n weights of which n1 are not 0, rounded down to the dtype; z is the rest

so that masters made from codes round to the very same codes, and to the scale within 2^-16 in bfloat16 and 2^-22 in
float32. They are not the weights that were trained: what rounding dropped is lost.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from plait.formats.computed import computed
from plait.formats.error import CheckpointError
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.ops.ternary import unpack_ternary
from plait.precision.ternary_packed import TernaryLinear, quantize_segments


def ternary_parts(
    name: str, part: str, tensor: LazyTensor, layer: TernaryLinear, dtype: torch.dtype
) -> Iterator[tuple[str, LazyTensor]]:
    """What the weight or bias of a ternary layer becomes in its packed twin.

    Args:
        name, part: of the tensor, such as "blocks.0.mixer.in_proj" and "weight".
        tensor: the master.
        layer: the twin, on meta.
        dtype: of rows that stay high, and of biases.
    """
    n = sum(layer.segments)
    if part == "bias":
        yield f"{name}.bias", tensor.rows(0, n).cast(dtype)
    else:
        make = partial(_quantised, name, tensor.rows(0, n), layer.segments)
        yield f"{name}.codes", computed(tuple(layer.codes.shape), torch.uint8, partial(make, 0))
        yield f"{name}.scales", computed(tuple(layer.scales.shape), torch.float32, partial(make, 1))
    if layer.high is not None:
        yield f"{name}.high.{part}", tensor.rows(n, tensor.shape[0] - n).cast(dtype)


def _quantised(name: str, weight: LazyTensor, segments: tuple[int, ...], part: int, first: int, n: int) -> Tensor:
    found = quantize_segments(weight.read(), segments)
    if not bool(found[1].isfinite().all()):
        raise CheckpointError(f"tensor '{name}.weight' holds what is no number; take an undamaged checkpoint")
    return found[part][first : first + n]


def masters_of(config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Tensors of a `ternary` model that rounds to these codes.

    Args:
        config: of the packed model.
        tensors: of the packed model, by our names.
        dtype: of the result.
    """
    with torch.device("meta"):
        model = Hybrid(config, recipe_of(config.recipe))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    copied = model.head is not None and config.ties_embeddings
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if part == "scales" or ".high." in name or (copied and base == "head"):
            continue
        layer = layers.get(base)
        if layer is None or part not in ("codes", "bias"):
            found[name] = tensor
            continue
        whole = tensor if part == "bias" else _master(tensor, tensors[f"{base}.scales"], layer, dtype)
        their = "bias" if part == "bias" else "weight"
        if layer.high is not None:
            high = tensors[f"{base}.high.{their}"]
            shape = (whole.shape[0] + high.shape[0], *whole.shape[1:])
            whole = LazyTensor(shape=shape, dtype=whole.dtype, runs=(*whole.runs, *high.runs))
        found[f"{base}.{their}"] = whole.cast(dtype)
    return found


def _master(codes: LazyTensor, scales: LazyTensor, layer: TernaryLinear, dtype: torch.dtype) -> LazyTensor:
    def make(first: int, n: int) -> Tensor:
        parts = zip(codes.read().split(layer.segments), scales.read().split(layer.segments), strict=True)
        return torch.cat([_values(c, float(s[0]), layer.d_in, dtype) for c, s in parts])[first : first + n]

    return computed((codes.shape[0], layer.d_in), dtype, make)


def _values(packed: Tensor, scale: float, d_in: int, dtype: torch.dtype) -> Tensor:
    """Masters of one segment."""
    codes = unpack_ternary(packed, d_in)
    n, n1 = codes.numel(), int(codes.count_nonzero())
    if n1 == 0:
        return torch.zeros(codes.shape, dtype=dtype)
    a = torch.tensor(scale * n / n1, dtype=torch.float64).to(dtype)
    if float(a) * n1 > scale * n:
        a = torch.nextafter(a, torch.zeros_like(a))
    z = (scale * n - float(a) * n1) / max(n - n1, 1)
    # so few zeros that the rest would round to a code: it is left out
    z = z if z < scale / 4 else 0.0
    return torch.where(codes == 0, torch.tensor(z, dtype=dtype), codes.to(dtype) * a)
