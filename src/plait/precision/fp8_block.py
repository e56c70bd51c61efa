"""FP8 in tiles for anyone: E4M3 codes, a scale for each 1 x 128 numbers of activations or 128 x 128 of weights.

The convention is TransformerEngine's block scaling: scale = largest / amax of the tile, rounded down to a power of two.
"""

from torch import Tensor

from plait.ops.fp8 import FP8, dequantize_fp8, quantize_fp8
from plait.precision.fp8 import ScaledFP8


def quantize(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: tuple[int, int] = (1, 128),
    power_of_two: bool = True,
    seed: int | Tensor | None = None,
) -> ScaledFP8:
    """Round a tensor to FP8, tile by tile.

    Args:
        x: (..., R, C) any float dtype; one dimension is enough for tiles of one row.
        element: "e4m3" (largest 448) or "e5m2" (57344).
        block: rows and columns of a tile; (128, 128) for weights.
        power_of_two: round scales down to powers of two; False keeps float32 scales, as DeepSeek-V3 did.
        seed: 0 <= seed < 2^63 rounds at random, the same for the same seed; None rounds to the nearest.

    Returns: codes in x's shape, and descale float32 (..., R / r, C / c).
    Raises: ValueError if the tile does not divide x.
    """
    return ScaledFP8(*quantize_fp8(x, element, block=block, power_of_two=power_of_two, seed=seed))


def dequantize(codes: Tensor, descale: Tensor) -> Tensor:
    """The float32 numbers that codes and descale stand for; ValueError if their shapes do not belong together."""
    return dequantize_fp8(codes, descale)
