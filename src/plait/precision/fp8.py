"""FP8 for anyone: E4M3 or E5M2 codes with one scale for the tensor or for each row.

The convention is TransformerEngine's current scaling: scale = largest / amax in float32, codes saturate and round to
nearest even. `ops.fp8.export_fp8` follows ModelOpt instead, which rounds twice.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from plait.ops.fp8 import FP8, dequantize_fp8, quantize_fp8


class ScaledFP8(NamedTuple):
    """codes: float8 in the tensor's shape; descale: float32, so that x ~ codes * descale."""

    codes: Tensor
    descale: Tensor


def quantize(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Literal["row"] | None = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> ScaledFP8:
    """Round a tensor to FP8.

    Args:
        x: (..., C) any float dtype.
        element: "e4m3" (largest 448) for weights and activations, "e5m2" (57344) for gradients.
        block: None for one scale, "row" for one for each row; tiles are in `plait.quant.fp8_block`.
        power_of_two: round scales down to powers of two.
        seed: 0 <= seed < 2^63 rounds at random, the same for the same seed; None rounds to the nearest.

    Returns: codes, and descale () or (..., 1).
    """
    return ScaledFP8(*quantize_fp8(x, element, block=block, power_of_two=power_of_two, seed=seed))


def dequantize(codes: Tensor, descale: Tensor) -> Tensor:
    """The float32 numbers that codes and descale stand for; ValueError if their shapes do not belong together."""
    return dequantize_fp8(codes, descale)
