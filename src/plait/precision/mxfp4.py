"""MXFP4 for anyone: 4-bit codes, each 32 neighbours under one power of two (4.25 bits a number).

The bits are torchao's `to_mx`, for each of its ways to find the power of two. ModelOpt's MXFP4 differs: it rounds ties
down.
"""

from torch import Tensor

from plait.ops.mx import Rounding, dequantize_mx, quantize_mx
from plait.precision.mxfp8 import MX


def quantize(x: Tensor, *, rounding: Rounding = "rceil", seed: int | Tensor | None = None) -> MX:
    """Round a tensor to MXFP4.

    Args:
        x: (..., D) any float dtype, D a multiple of 32.
        rounding: "rceil", "floor", "ceil" or "even"; equations in ops/mx.py.
        seed: 0 <= seed < 2^63 rounds codes at random, the same for the same seed; None rounds to the nearest.

    Returns: codes (..., D / 2) uint8, the first of two in the low four bits; scales (..., D / 32).
    Raises: ValueError if 32 does not divide D.
    """
    return MX(*quantize_mx(x, "e2m1", rounding=rounding, seed=seed))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that codes and scales stand for; ValueError if their shapes do not belong together."""
    return dequantize_mx(codes, scales)
