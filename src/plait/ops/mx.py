"""MX formats: numbers of 8 or 4 bits, each 32 neighbours under one power of two.

    floor   2^(floor(log2 amax) - e_max)                 the OCP text; the largest numbers may saturate
    rceil   amax / largest, rounded up to a power of two  nothing saturates; what the hardware and ModelOpt do
    ceil    amax rounded up to a power of two, / 2^e_max
    even    amax rounded to the element's mantissa first, then as floor

e_max is the exponent of the element's largest number: 8 for e4m3, 15 for e5m2, 2 for e2m1.

Shapes   (..., D), D a multiple of 32; scales (..., D / 32).
Numbers  scales are uint8, E8M0 bits: 2^(code - 127); 255 is NaN, and is the scale of a block that holds an infinity or
         a NaN. Codes round to nearest even and saturate, or round at random. The same bits as torchao's `to_mx`.
Source   OCP Microscaling Formats 1.0; NVIDIA 2025, arXiv:2506.08027 (rceil).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from plait.ops.cast import MINIFLOATS, decode, encode, minifloat, pack_fp4, unpack_fp4
from plait.ops.dispatch import Op, native_serves, triton_serves
from plait.ops.fp8 import block_amax, divides, exact_quotient, spread
from plait.ops.random import uniform

BLOCK = (1, 32)
Rounding = Literal["floor", "rceil", "ceil", "even"]
MXElement = Literal["e4m3", "e5m2", "e2m1"]


@Op
def quantize_mx(
    x: Tensor, element: MXElement = "e4m3", *, rounding: Rounding = "rceil", seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a tensor to MX codes.

    Args:
        x: (..., D) any float dtype, D a multiple of 32.
        element: "e4m3", "e5m2" or "e2m1".
        rounding: how a block's power of two is found; see the file's docstring.
        seed: round codes at random, with the numbers of `ops.random.uniform` for this seed; None to the nearest.

    Returns: codes, float8 in x's shape or, for e2m1, two a byte (..., D / 2) uint8; scales (..., D / 32) uint8 of E8M0.
    Raises: ValueError if 32 does not divide D.
    """
    scales = mx_scale(block_amax(x, BLOCK), element, rounding)
    # 2^-127 is no divisor: with "rceil" numbers so small are not scaled (they become zero), else a little less
    power = torch.where(scales == 0, 1.0 if rounding == "rceil" else 2.0**-126, decode(scales, "e8m0"))
    noise = None if seed is None else uniform(x.shape, seed=seed, device=x.device)
    codes = encode(x.float() / spread(power, x.shape), element, noise=noise)
    return pack_fp4(codes) if element == "e2m1" else codes, scales


def _fits(
    x: Tensor, element: MXElement = "e4m3", *, rounding: Rounding = "rceil", seed: int | Tensor | None = None
) -> bool:
    if element not in MINIFLOATS or rounding != "rceil" or not native_serves("quantise", x):
        return False
    from plait.kernels.native import quantise

    return quantise.fits(x, BLOCK)


@quantize_mx.backend("native", when=_fits)
def _(
    x: Tensor, element: MXElement = "e4m3", *, rounding: Rounding = "rceil", seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from plait.kernels.native import quantise

    return quantise.codes(quantise.matrix(x.detach()), element, "e8m0", BLOCK, seed=seed)


def _fits_gpu(
    x: Tensor, element: MXElement = "e4m3", *, rounding: Rounding = "rceil", seed: int | Tensor | None = None
) -> bool:
    return element in MINIFLOATS and rounding == "rceil" and divides(BLOCK, x) and triton_serves(x)


@quantize_mx.backend("triton", when=_fits_gpu)
def _(
    x: Tensor, element: MXElement = "e4m3", *, rounding: Rounding = "rceil", seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from plait.kernels.triton import quant

    return quant.codes(x.detach(), element, "e8m0", BLOCK, seed=seed)


@Op
def dequantize_mx(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that codes (float8, or packed uint8 of e2m1) and scales of `quantize_mx` stand for."""
    if codes.dtype == torch.uint8:
        values = decode(unpack_fp4(codes), "e2m1")
    else:
        values = decode(codes, "e5m2" if codes.dtype == torch.float8_e5m2 else "e4m3")
    return values * spread(decode(scales, "e8m0"), values.shape)


def mx_scale(amax: Tensor, element: MXElement, rounding: Rounding) -> Tensor:
    """E8M0 bits (uint8) of the scales of blocks with these largest magnitudes (float32)."""
    form = minifloat(element)
    e_max = int(math.log2(form.largest))
    if rounding == "rceil":
        amax, e_max = exact_quotient(amax, form.largest), 0
    bits = amax.view(torch.int32)
    if rounding == "even":
        bits = bits + (1 << (22 - form.mantissa))
    exponent = bits >> 23
    if rounding in ("rceil", "ceil"):
        # a subnormal number is at most 2^-127 up to half of its bits
        exponent = exponent + ((bits & 0x7FFFFF) > torch.where(exponent == 0, 0x400000, 0))
    elif rounding not in ("floor", "even"):
        raise ValueError(f"rounding={rounding!r} is unknown; choose floor, rceil, ceil or even")
    code = (exponent - e_max).clamp(0, 254)
    return torch.where(amax.isfinite(), code, 255).to(torch.uint8)
