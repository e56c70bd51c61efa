"""NVFP4: numbers of 4 bits, each 16 neighbours (or 16 x 16) under an E4M3 scale, and one float32 scale for the tensor.

    G = 2688 / amax                       2688 = 448 * 6, so that the largest block scale is 448
    s = e4m3(min(amax_b * (G / 6), 448))  of each block
    q = e2m1(x * 1 / (s * 1 / G));        x ~ q * s / G

The order of operations, which decides ties, is TransformerEngine's for training; `export_nvfp4` follows ModelOpt's.

Shapes   R rows, C columns; blocks (1, 16) along the last dimension, or (16, 16): then a matrix and its transpose have
         the same codes and scales. codes (R, C / 2) bytes, scales (R, C / 16) or (R / 16, C / 16).
Numbers  float32 inside. A block of zeros has scale 0; minus zero becomes zero. G that overflows is the largest float32;
         amax 0 gives G = 1. If any number is infinite or NaN, amax is NaN and so is all that is decoded.
         4 + 8 / 16 = 4.5 bits a number.
Source   NVIDIA 2025, arXiv:2509.25149 section 4 and appendix C.
"""

from typing import Literal

import torch
from torch import Tensor

from plait.ops.cast import decode, encode, pack_fp4, unpack_fp4
from plait.ops.dispatch import Op, native_serves, triton_serves
from plait.ops.fp8 import block_amax, check_block, divides, exact_quotient, spread
from plait.ops.hadamard import hadamard16, is_signs
from plait.ops.random import uniform

Block = tuple[Literal[1], Literal[16]] | tuple[Literal[16], Literal[16]]
ROW: Block = (1, 16)
LARGEST = 448.0 * 6.0
_FLOAT_MAX = torch.finfo(torch.float32).max


@Op
def quantize_nvfp4(
    x: Tensor,
    *,
    block: Block = ROW,
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a tensor to NVFP4; TransformerEngine's order of operations.

    Args:
        x: (..., R, C) any float dtype; one dimension is enough for blocks (1, 16).
        block: (1, 16), or (16, 16) for weights, whose transpose must be the same numbers.
        hadamard: signs of a rotation of each 16 numbers along the blocks, taken first; None for none.
        seed: round at random, with the numbers of `ops.random.uniform` for this seed; None to the nearest.
        transposed: quantise the transpose (..., C, R) of x: blocks and the rotation run along x's rows, and the random
            numbers are counted in the transpose.

    Returns: of x, or of its transpose: codes (..., R, C / 2) uint8, two a byte; scales (..., R, C / 16) or
        (..., R / 16, C / 16) float8_e4m3fn; amax () float32, the largest magnitude (after the rotation).
    Raises: ValueError if the block does not divide the tensor.
    """
    if transposed:
        x = x.mT
    check_block(x.shape, block)
    if hadamard is not None:
        x = hadamard16(x, hadamard)
    amax_b = block_amax(x, block)
    amax = amax_b.amax() if amax_b.numel() else amax_b.new_zeros(())
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    G = global_scale(amax)
    scales = encode((amax_b * (G * (1.0 / 6.0))).clamp(max=448.0), "e4m3")
    # infinite for blocks whose scale is 0: their numbers are 0, or too small for any scale
    factor = (1.0 / (decode(scales, "e4m3") * (1.0 / G))).clamp(max=_FLOAT_MAX)
    scaled = x.float() * spread(factor, x.shape)
    noise = None if seed is None else uniform(x.shape, seed=seed, device=x.device)
    codes = encode(torch.where(scaled == 0, 0.0, scaled), "e2m1", noise=noise)
    return pack_fp4(codes), scales, amax


def _fits(
    x: Tensor,
    *,
    block: Block = ROW,
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> bool:
    if block not in (ROW, (16, 16)) or not (hadamard is None or is_signs(hadamard)) or not native_serves("quantise", x):
        return False
    from plait.kernels.native import quantise

    return quantise.fits(x, block, transposed=transposed, rotated=hadamard is not None)


@quantize_nvfp4.backend("native", when=_fits)
def _(
    x: Tensor,
    *,
    block: Block = ROW,
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from plait.kernels.native import quantise

    m = quantise.matrix(x.detach(), transposed)
    amax = quantise.amax(m, hadamard)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    codes, scales = quantise.codes(m, "e2m1", "e4m3", block, given=global_scale(amax), signs=hadamard, seed=seed)
    return codes, scales, amax


def _fits_gpu(
    x: Tensor,
    *,
    block: Block = ROW,
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> bool:
    signs = hadamard is None or is_signs(hadamard)
    return block in (ROW, (16, 16)) and signs and divides(block, x.mT if transposed else x) and triton_serves(x)


@quantize_nvfp4.backend("triton", when=_fits_gpu)
def _(
    x: Tensor,
    *,
    block: Block = ROW,
    hadamard: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from plait.kernels.triton import quant

    x = x.detach().mT if transposed else x.detach()
    amax = quant.amax(x, hadamard)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    codes, scales = quant.codes(x, "e2m1", "e4m3", block, given=global_scale(amax), signs=hadamard, seed=seed)
    return codes, scales, amax


@Op
def dequantize_nvfp4(codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
    """The float32 numbers that codes, scales and amax of `quantize_nvfp4` stand for (still rotated, if they were)."""
    values = decode(unpack_fp4(codes), "e2m1")
    return values * spread(decode(scales, "e4m3") * global_descale(amax), values.shape)


def global_scale(amax: Tensor) -> Tensor:
    """G () float32, by which a tensor with this largest magnitude is scaled as a whole."""
    return torch.where(amax == 0, 1.0, exact_quotient(LARGEST, amax).clamp(max=_FLOAT_MAX))


def global_descale(amax: Tensor) -> Tensor:
    """1 / G () float32, the tensor-wide factor of products of codes and block scales."""
    # as TransformerEngine decodes: 2688 times the rounded 1 / amax, which may differ from G in its last bit
    return torch.where(amax == 0, 1.0, 1.0 / (LARGEST * (1.0 / amax)).clamp(max=_FLOAT_MAX))


def export_nvfp4(w: Tensor, *, scale_2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to NVFP4 as ModelOpt writes checkpoints for inference engines; blocks of (1, 16).

    Args:
        w: (..., C) any float dtype, not all zeros.
        scale_2: amax / 2688 of all the weights that share it (q, k and v); None takes w's own.

    Returns: codes (..., C / 2) uint8, two a byte; scales (..., C / 16) float8_e4m3fn; scale_2 () float32, so that
        w ~ code * scale * scale_2.
    Raises: ValueError if 16 does not divide C.
    """
    check_block(w.shape, ROW)
    amax_b = block_amax(w, ROW)
    scale_2 = exact_quotient(amax_b.amax(), LARGEST) if scale_2 is None else scale_2.float()
    scale = (amax_b / (6.0 * scale_2)).clamp(2.0**-9, 448.0)
    scales = encode(torch.where(amax_b == 0, 1.0, scale), "e4m3")
    scaled = w.float() / spread(decode(scales, "e4m3") * scale_2, w.shape)
    return pack_fp4(encode(torch.where(scaled == 0, 0.0, scaled), "e2m1")), scales, scale_2
