"""BitNet's packed checkpoints, as Hugging Face folders hold them: two bits a weight, four far rows in a byte.

    byte row r of X.weight (N / 4, K) uint8: rows r, N/4 + r, 2N/4 + r, 3N/4 + r from its low bits up, each value + 1
    X.weight_scale (1): what a weight of 1 stands for (linear_class autobitlinear), or 1 over that (bitlinear)

Our names for the same are X.codes, in the layout of ops/ternary.py, and X.scales, one for each row.

Source   transformers 5.23, integrations/bitnet.py.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from plait.formats.computed import computed
from plait.formats.error import CheckpointError
from plait.formats.rules import Names, shapes_of, to_ours, to_theirs
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.ops.ternary import pack_ternary, packed_width, unpack_ternary

# bytes of theirs that are turned into ours at a time
_AT_ONCE = 8 << 20
_SCALE = "_scale"


def from_packed(
    names: Names, config: ModelConfig, stored: Mapping[str, LazyTensor], where: str, *, divides: bool
) -> dict[str, LazyTensor]:
    """The tensors of a packed folder, by our names.

    Args:
        names: rules of the family.
        config: what the model must look like.
        stored: the tensors by the names in the file.
        where: the folder, for messages.
        divides: whether its scales are the reciprocals.

    Raises: CheckpointError naming a tensor of another shape, a scale that is no positive number, and what is missing.
    """
    plain, packed = dict(stored), {}
    for name, shape in shapes_of(config).items():
        found = names.find(config, name)
        if found is None or not _is_packed(name):
            continue
        (theirs,) = found[0].names(found[1], shape)
        weight, scale = plain.get(theirs), plain.pop(theirs + _SCALE, None)
        if weight is None:
            continue
        _check(theirs, weight, scale, shape, where)
        assert scale is not None
        packed[name] = weight, _number(theirs, scale, where, divides)
        # for the search of names a matrix like any other
        plain[theirs] = LazyTensor(shape=shape, dtype=torch.bfloat16, runs=())
    ours: dict[str, LazyTensor] = {}
    for name, tensor in to_ours(names, config, plain, where).items():
        if name not in packed:
            ours[name] = tensor
            continue
        weight, scale = packed[name]
        d_out, d_in = tensor.shape
        make = partial(_our_rows, weight, d_out, f"{where}: {name}")
        base = name.removesuffix(".weight")
        ours[f"{base}.codes"] = computed((d_out, packed_width(d_in)), torch.uint8, make, max(1, _AT_ONCE // d_in))
        ours[f"{base}.scales"] = LazyTensor.of(torch.full((d_out,), scale))
    return ours


def to_packed(names: Names, config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Packed tensors of ours by the names of the family; scales multiply.

    Raises: CheckpointError naming a tensor without a place; on reading, a weight whose rows differ in scale.
    """
    shapes = shapes_of(config)
    plain = {name: t for name, t in tensors.items() if not name.endswith((".codes", ".scales"))}
    theirs = to_theirs(names, config, plain)
    for name, codes in tensors.items():
        if not name.endswith(".codes"):
            continue
        base = name.removesuffix(".codes")
        found = names.find(config, f"{base}.weight")
        assert found is not None
        d_out, d_in = shapes[f"{base}.weight"]
        (their,) = found[0].names(found[1], (d_out, d_in))
        height = -(-d_out // 4)
        make = partial(_their_rows, codes, height, d_in)
        theirs[their] = computed((height, d_in), torch.uint8, make, max(1, _AT_ONCE // d_in))
        theirs[their + _SCALE] = computed((1,), torch.float32, partial(_one_scale, tensors[f"{base}.scales"], base))
    return theirs


def _is_packed(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith("_proj.weight")


def _check(theirs: str, weight: LazyTensor, scale: LazyTensor | None, shape: tuple[int, ...], where: str) -> None:
    d_out, d_in = shape
    if weight.dtype != torch.uint8:
        raise CheckpointError(
            f"{where}: quantization_config says that weights are packed, but {theirs!r} holds {weight.dtype}; masters "
            "have quantization_mode 'online'"
        )
    if weight.shape != (-(-d_out // 4), d_in):
        raise CheckpointError(
            f"{where}: tensor {theirs!r} has shape {weight.shape}; with four rows a byte a matrix of {d_out} x {d_in} "
            f"has {(-(-d_out // 4), d_in)}: config and tensors do not belong together"
        )
    if scale is None:
        raise CheckpointError(f"{where}: {theirs!r} is packed, but {theirs + _SCALE!r} is missing; fetch it again")
    if math.prod(scale.shape) != 1 or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{where}: tensor {theirs + _SCALE!r} has shape {scale.shape} and holds {scale.dtype}; a packed matrix has "
            "one number, (1,): merged projections and scales of rows are another program's layout"
        )


def _number(theirs: str, scale: LazyTensor, where: str, divides: bool) -> float:
    value = float(scale.read().float())
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{where}: tensor {theirs + _SCALE!r} holds {value}, expected a positive number")
    return 1 / value if divides else value


def _our_rows(weight: LazyTensor, d_out: int, what: str, first: int, n: int) -> Tensor:
    """Our rows first ... first + n - 1 of a matrix, from the fields of theirs."""
    height, found = weight.shape[0], []
    for field in range(4):
        low, high = max(first, field * height), min(first + n, (field + 1) * height, d_out)
        if low < high:
            codes = weight.rows(low - field * height, high - low).read() >> 2 * field & 3
            if bool((codes == 3).any()):
                raise CheckpointError(f"{what} holds a code that stands for no ternary value; the file is damaged")
            found.append(pack_ternary(codes.to(torch.int8) - 1))
    return torch.cat(found)


def _their_rows(codes: LazyTensor, height: int, d_in: int, first: int, n: int) -> Tensor:
    """Their byte rows first ... first + n - 1; a last field may have fewer rows."""
    out = torch.zeros(n, d_in, dtype=torch.uint8)
    for field in range(4):
        low = field * height + first
        count = min(n, codes.shape[0] - low)
        if count > 0:
            values = unpack_ternary(codes.rows(low, count).read(), d_in) + 1
            out[:count] |= values.to(torch.uint8) << 2 * field
    return out


def _one_scale(scales: LazyTensor, name: str, first: int, n: int) -> Tensor:
    values = scales.read()
    if not bool((values == values[0]).all()):
        raise CheckpointError(
            f"{name}: its rows differ in scale, which a packed BitNet folder cannot say; save as native"
        )
    return values[:1]
