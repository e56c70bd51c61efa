"""NVFP4 for anyone: 4-bit codes, each 16 neighbours under an E4M3 scale, and one float32 for the tensor (4.5 bits).

The convention is TransformerEngine's order of operations, as in training; `ops.nvfp4.export_nvfp4` follows ModelOpt's
for checkpoints. The two differ in ties, and where block scales underflow.
"""

from typing import NamedTuple

from torch import Tensor

from plait.ops.nvfp4 import ROW, Block, dequantize_nvfp4, quantize_nvfp4


class NVFP4(NamedTuple):
    """codes: uint8, two a byte; scales: float8_e4m3fn, one a block; amax: () float32, the largest magnitude."""

    codes: Tensor
    scales: Tensor
    amax: Tensor


def quantize(
    x: Tensor, *, block: Block = ROW, hadamard: tuple[int, ...] | None = None, seed: int | Tensor | None = None
) -> NVFP4:
    """Round a tensor to NVFP4.

    Args:
        x: (..., R, C) any float dtype; one dimension is enough for blocks (1, 16).
        block: (1, 16), or (16, 16): then a matrix and its transpose become the same numbers.
        hadamard: 16 signs of a rotation along the rows, taken first, such as `ops.hadamard.SIGNS`; None for none.
        seed: 0 <= seed < 2^63 rounds codes at random, the same for the same seed; None rounds to the nearest.

    Returns: codes (..., R, C / 2), scales (..., R, C / 16) or (..., R / 16, C / 16), amax.
    Raises: ValueError if the block does not divide x.
    """
    return NVFP4(*quantize_nvfp4(x, block=block, hadamard=hadamard, seed=seed))


def dequantize(codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
    """The float32 numbers these stand for (still rotated, if they were); ValueError for shapes that do not fit."""
    return dequantize_nvfp4(codes, scales, amax)
