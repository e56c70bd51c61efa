"""Numbers of 8 and 4 bits: rounding to them, to the nearest or at random, and reading them back.

    step  = 2^(max(e, e_min) - m),  2^e <= |x| < 2^(e+1)        the distance of x's two neighbours
    value = step * round(x / step), ties to even                 nearest
    value = step * (floor(x / step) + [u < x / step - floor])    stochastic: the mean over u is x itself

Elements (e_min, m, largest)   e4m3 (-6, 3, 448)   e5m2 (-14, 2, 57344)   e2m1 (0, 1, 6)   e8m0: 2^(code - 127)
Numbers  Larger numbers and infinities become the largest; x is clamped before each cast, since torch's own casts
         overflow differently from version to version. NaN stays NaN in e4m3, e5m2 and e8m0. e2m1 has none: a NaN
         becomes 0 there, and who scales by blocks must let the scale carry it. Zeros keep their sign.
Source   Micikevicius et al. 2022, arXiv:2209.05433; OCP Microscaling Formats 1.0, section 5.3.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Element = Literal["e4m3", "e5m2", "e2m1", "e8m0"]


class MiniFloat(NamedTuple):
    """e_min: exponent of the smallest normal number; mantissa: bits of it; largest: finite; dtype: of its codes."""

    e_min: int
    mantissa: int
    largest: float
    dtype: torch.dtype


MINIFLOATS = {
    "e4m3": MiniFloat(-6, 3, 448.0, torch.float8_e4m3fn),
    "e5m2": MiniFloat(-14, 2, 57344.0, torch.float8_e5m2),
    "e2m1": MiniFloat(0, 1, 6.0, torch.uint8),
}


def encode(x: Tensor, element: Element, *, noise: Tensor | None = None) -> Tensor:
    """Round to an element format.

    Args:
        x: any shape, any float dtype; for "e8m0" positive numbers, rounded to the nearest power of two.
        element: "e4m3", "e5m2", "e2m1" or "e8m0".
        noise: uniform numbers in [0, 1) of x's shape: round at random between the two neighbours, away from zero with
            a chance that is the distance to the other. None: to the nearest, ties to even.

    Returns: codes in x's shape: float8 for e4m3 and e5m2, uint8 for e2m1 (0 to 15, unpacked) and e8m0.
    Raises: ValueError for an unknown element, or noise that does not fit.
    """
    if element == "e8m0":
        if noise is not None:
            raise ValueError("noise: scales in e8m0 are never rounded at random; leave noise out")
        return x.to(torch.float8_e8m0fnu).view(torch.uint8)
    form = minifloat(element)
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; give one number for each of x's {tuple(x.shape)}")
    x = x.float().clamp(-form.largest, form.largest)
    if noise is None and element != "e2m1":
        return x.to(form.dtype)
    power, rounded = _round(x.abs(), form, noise)
    if element == "e2m1":
        # 0, 1, 2, 3 halves; 2, 3 ones; 2, 3 twos: codes 0 to 7
        code = rounded + 2 * torch.log2(power)
        return (code.nan_to_num(0) + 8 * torch.signbit(x)).to(torch.uint8)
    return torch.copysign(rounded * (power * 2.0**-form.mantissa), x).to(form.dtype)


def decode(codes: Tensor, element: Element) -> Tensor:
    """The float32 numbers that codes of `encode` stand for, in their shape.

    Args:
        codes: as `encode` gives them; of the 8-bit formats also their bits as uint8.
        element: "e4m3", "e5m2", "e2m1" or "e8m0".
    """
    if element == "e2m1":
        magnitude = (codes & 7).float()
        # code = rounded + 2 e: the halves up to 2, then 3 and 4 in ones, 6 in twos
        value = torch.where(magnitude < 5, magnitude / 2, torch.where(magnitude < 7, magnitude - 2, 6.0))
        return torch.where(codes > 7, -value, value)
    if element == "e8m0":
        bits = codes.view(torch.uint8).int()
        # code 0 is 2^-127, a subnormal number; code 255 is NaN
        bits = torch.where(bits == 0, 0x00400000, torch.where(bits == 255, 0x7FC00000, bits << 23))
        return bits.view(torch.float32)
    return codes.view(minifloat(element).dtype).float()


def pack_fp4(codes: Tensor) -> Tensor:
    """(..., D) codes 0 to 15, uint8, into (..., D / 2) bytes, the first of two in the low four bits."""
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes in a row: two share a byte, so pad the rows to an even length")
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """(..., D / 2) bytes to the (..., D) codes that `pack_fp4` took."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def minifloat(element: str) -> MiniFloat:
    """The format of that name; ValueError for one that does not exist."""
    if element not in MINIFLOATS:
        raise ValueError(f"element {element!r} is unknown; choose one of {', '.join(MINIFLOATS)}")
    return MINIFLOATS[element]


def _round(a: Tensor, form: MiniFloat, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The power of two 2^max(e, e_min) of magnitudes, and how many of the steps 2^-m of it they are rounded to."""
    power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**form.e_min)
    steps = a / (power * 2.0**-form.mantissa)
    if noise is None:
        return power, steps.round()
    floor = steps.floor()
    return power, floor + (noise < steps - floor)
