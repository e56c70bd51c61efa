"""MXFP8 for anyone: 8-bit codes, each 32 neighbours under one power of two (8.25 bits a number).

The bits are torchao's `to_mx`, for each of its ways to find the power of two; "rceil", the default, is also ModelOpt's
and the hardware's.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from plait.ops.mx import Rounding, dequantize_mx, quantize_mx


class MX(NamedTuple):
    """codes: float8, or uint8 that hold two e2m1 each; scales: uint8, the bits of E8M0, one for 32 numbers of a row."""

    codes: Tensor
    scales: Tensor


def quantize(
    x: Tensor,
    element: Literal["e4m3", "e5m2"] = "e4m3",
    *,
    rounding: Rounding = "rceil",
    seed: int | Tensor | None = None,
) -> MX:
    """Round a tensor to MXFP8.

    Args:
        x: (..., D) any float dtype, D a multiple of 32.
        element: "e4m3" or "e5m2".
        rounding: "rceil", "floor", "ceil" or "even"; equations in ops/mx.py.
        seed: 0 <= seed < 2^63 rounds codes at random, the same for the same seed; None rounds to the nearest.

    Returns: codes (..., D), scales (..., D / 32).
    Raises: ValueError if 32 does not divide D.
    """
    return MX(*quantize_mx(x, element, rounding=rounding, seed=seed))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that codes and scales stand for; ValueError if their shapes do not belong together."""
    return dequantize_mx(codes, scales)
