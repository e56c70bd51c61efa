"""Operands of matrix products in few bits, for a GEMM that multiplies bfloat16: the emulation of tensor cores.

    x ~ operand * descale;          operand = code * scale of its block

Codes of 8 bits, and E2M1 codes times E4M3 scales, have at most 6 significant bits: they are exact in bfloat16, and a
product of such operands with float32 sums is what a tensor core computes. descale goes onto the product.

Shapes   R rows, C columns of memory; an operand is (R, C), or (C, R) of the transpose, summed over its last dimension.
Numbers  the values of plait.ops.{fp8,mx,nvfp4}, which say how they are rounded. Numbers of an operand below 2^-126 may
         become zeros, as they do in bfloat16 products. Blocks with float32 scales that are no powers of two are not
         exact in bfloat16: their operand is float32.
"""

from typing import Literal

import torch
from torch import Tensor

from plait.ops.cast import decode, minifloat, unpack_fp4
from plait.ops.dispatch import Op, native_serves, triton_serves
from plait.ops.fp8 import Block, dequantize_fp8, divides, fp8_scale, quantize_fp8, spread
from plait.ops.hadamard import hadamard16, is_signs
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import global_descale, global_scale, quantize_nvfp4

Scale = Literal["float32", "pow2", "e8m0", "e4m3"]
# what each scale may be shared by
BLOCKS: dict[str, tuple[Block, ...]] = {
    "float32": (None, "row", (1, 128), (128, 128)),
    "pow2": (None, "row", (1, 128), (128, 128)),
    "e8m0": ((1, 32),),
    "e4m3": ((1, 16), (16, 16)),
}
ELEMENTS = {"e4m3": ("float32", "pow2", "e8m0"), "e5m2": ("float32", "pow2", "e8m0"), "e2m1": ("e8m0", "e4m3")}


@Op
def operand(
    x: Tensor,
    *,
    element: str,
    block: Block = None,
    scale: Scale = "float32",
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round a matrix for a product that sums over its last dimension.

    Args:
        x: (R, C) float32 or bfloat16.
        element: "e4m3", "e5m2" or "e2m1".
        block: what shares a scale: None the tensor, "row", or a tile (r, c) of the operand.
        scale: the scales' own numbers: "float32"; "pow2", float32 rounded to powers of two; "e8m0" (MX, rounded up);
            "e4m3" under one for the tensor (NVFP4).
        hadamard: signs of a rotation of each 16 numbers that are summed over, taken first; None for none.
        seed: round at random, with numbers that count along the operand's rows; None to the nearest.
        transposed: the operand is x's transpose (C, R): for a sum over x's rows.

    Returns: operand bfloat16 (float32 for tiles with "float32" scales), perhaps a view of x's order of memory; descale
        float32, () or (rows of the operand, 1).
    Raises: ValueError for a combination that is no format, or tiles that do not divide the operand.
    """
    if element not in ELEMENTS or scale not in ELEMENTS[element] or block not in BLOCKS[scale]:
        raise ValueError(
            f"element={element!r}, scale={scale!r}, block={block!r} is no format: e4m3 and e5m2 take scales "
            f"{', '.join(ELEMENTS['e4m3'])}, e2m1 {', '.join(ELEMENTS['e2m1'])}; shared by {BLOCKS}"
        )
    if scale == "e4m3":
        how = {"block": block, "hadamard": hadamard, "seed": seed, "transposed": transposed}
        codes, scales, amax = quantize_nvfp4(x, **how)  # type: ignore[arg-type]
        return operand_of(codes, scales), global_descale(amax)
    x = x.mT if transposed else x
    if hadamard is not None:
        x = hadamard16(x, hadamard)
    if scale == "e8m0":
        return operand_of(*quantize_mx(x, element, seed=seed)), torch.ones((), device=x.device)  # type: ignore[arg-type]
    codes, descale = quantize_fp8(x, element, block=block, power_of_two=scale == "pow2", seed=seed)  # type: ignore[arg-type]
    if block is None or block == "row":
        return operand_of(codes), descale
    if scale == "float32":
        return dequantize_fp8(codes, descale), torch.ones((), device=x.device)
    return operand_of(codes, descale), torch.ones((), device=x.device)


@Op
def operand_of(codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """The operand that stored codes stand for.

    Args:
        codes: float8, or two E2M1 codes a byte (..., C / 2) uint8.
        scales: of blocks: float8_e4m3fn (NVFP4), uint8 of E8M0 (MX) or float32 powers of two; None for 1.

    Returns: (..., C) bfloat16.
    """
    if codes.dtype == torch.uint8:
        values = decode(unpack_fp4(codes), "e2m1")
    else:
        values = decode(codes, "e5m2" if codes.dtype == torch.float8_e5m2 else "e4m3")
    if scales is None:
        return values.bfloat16()
    if scales.dtype == torch.float8_e4m3fn:
        scales = decode(scales, "e4m3")
    elif scales.dtype == torch.uint8:
        scales = decode(scales, "e8m0")
    return (values * spread(scales, values.shape)).bfloat16()


def _is_fused(
    x: Tensor, element: str, block: Block, scale: Scale, hadamard: tuple[int, ...] | None, transposed: bool
) -> bool:
    if x.dim() != 2 or element not in ELEMENTS or scale not in ELEMENTS[element] or block not in BLOCKS[scale]:
        return False
    # rotations of other formats, and float32 tiles, are made in parts, by the reference above
    apart = (scale != "e4m3" and hadamard is not None) or (scale == "float32" and isinstance(block, tuple))
    if apart or block == "row" or not (hadamard is None or is_signs(hadamard)):
        return False
    return divides(block if isinstance(block, tuple) else None, x.mT if transposed else x)


def _fits(
    x: Tensor,
    *,
    element: str,
    block: Block = None,
    scale: Scale = "float32",
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> bool:
    if not _is_fused(x, element, block, scale, hadamard, transposed) or not native_serves("quantise", x):
        return False
    from plait.kernels.native import quantise

    tile, rotated = block if isinstance(block, tuple) else None, hadamard is not None
    return quantise.fits(x, tile, transposed=transposed, rotated=rotated, random=seed is not None)


def _fits_gpu(
    x: Tensor,
    *,
    element: str,
    block: Block = None,
    scale: Scale = "float32",
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> bool:
    return _is_fused(x, element, block, scale, hadamard, transposed) and triton_serves(x)


@operand.backend("native", when=_fits)
def _(
    x: Tensor,
    *,
    element: str,
    block: Block = None,
    scale: Scale = "float32",
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.native import quantise

    m = quantise.matrix(x.detach(), transposed)
    if isinstance(block, tuple) and scale != "e4m3":
        return quantise.operand(m, element, scale, block, seed=seed), torch.ones(())
    how, given, descale = _whole(quantise.amax(m, hadamard), element, scale, x.dtype)
    tile = block if isinstance(block, tuple) else None
    return quantise.operand(m, element, how, tile, given=given, signs=hadamard, seed=seed), descale


@operand.backend("triton", when=_fits_gpu)
def _(
    x: Tensor,
    *,
    element: str,
    block: Block = None,
    scale: Scale = "float32",
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.triton import quant

    x = x.detach().mT if transposed else x.detach()
    if isinstance(block, tuple) and scale != "e4m3":
        return quant.operand(x, element, scale, block, seed=seed), torch.ones((), device=x.device)
    how, given, descale = _whole(quant.amax(x, hadamard), element, scale, x.dtype)
    tile = block if isinstance(block, tuple) else None
    return quant.operand(x, element, how, tile, given=given, signs=hadamard, seed=seed), descale


def _whole(amax: Tensor, element: str, scale: Scale, dtype: torch.dtype) -> tuple[str, Tensor, Tensor]:
    """Of a tensor with this largest magnitude: the kernels' kind of scale, the tensor's own, and descale."""
    if scale == "e4m3":
        amax = torch.where(amax.isfinite(), amax, torch.nan)
        return scale, global_scale(amax), global_descale(amax)
    given = fp8_scale(amax, minifloat(element).largest, torch.finfo(dtype).max, scale == "pow2")
    return "given", given, 1.0 / given


def _opens(codes: Tensor, scales: Tensor | None = None) -> bool:
    C = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1) if codes.dim() else 0
    blocks = scales is None or (scales.dim() == codes.dim() == 2 and scales.numel() > 0 and C % scales.shape[1] == 0)
    whole = scales is None or not blocks or codes.shape[0] % scales.shape[0] == 0
    dense = codes.is_contiguous() and (scales is None or scales.is_contiguous())
    return codes.numel() > 0 and blocks and whole and dense and codes.is_cpu and native_serves("quantise")


@operand_of.backend("native", when=_opens)
def _(codes: Tensor, scales: Tensor | None = None) -> Tensor:
    from plait.kernels.native import quantise

    return quantise.decode(codes, scales)
