"""Products of codes on tensor cores, y = A B^T, by torch's scaled_mm with scales in the layouts it asks for.

    scale for                                   given here           handed on as
    the tensor                                  ()                   ()
    each row                                    (R, 1)               A (M, 1), B (1, N)
    1 x 128                                     (R, C / 128)         the same, rows next to each other in memory
    128 x 128                                   (R / 128, C / 128)   transposed, with columns padded to 4
    1 x 32 (MX), 1 x 16 or 16 x 16 (NVFP4)      (R, C / 32), ...     rows in tiles of 128 x 4: see `tiled`

Shapes   A (M, K), B (N, K) codes, two E2M1 codes a byte; R rows and C numbers of either.
Numbers  float32 sums; with `fast` those of Hopper's FP8 keep fewer bits between instructions, as papers allow forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Block = str | tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Side:
    """An operand. scales: as the quantisers give them. descale: () float32 besides, of NVFP4. block: see `ops.fp8`."""

    codes: Tensor
    scales: Tensor
    descale: Tensor | None
    block: Block


def capability(device: torch.device) -> tuple[int, int]:
    """The generation of a GPU's tensor cores, (9, 0) for Hopper; (0, 0) where there are none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def served(a: Block, b: Block, elements: tuple[str, str], device: torch.device) -> bool:
    """Whether the device multiplies such operands.

    Args:
        a, b: what shares a scale in each.
        elements: of their codes.
        device: where they are.
    """
    here = capability(device)
    if here < (8, 9) or not hasattr(F, "scaled_mm") or elements == ("e5m2", "e5m2"):
        return False
    match a, b:
        case None, None:
            return "e2m1" not in elements
        case "row", "row":
            return here >= (9, 0) and elements == ("e4m3", "e4m3")
        case (1, 128), (1, 128) | (128, 128):
            return here == (9, 0) and elements == ("e4m3", "e4m3")
        case (1, 32), (1, 32):
            return here[0] == 10 and elements == ("e4m3", "e4m3")
        case (1, 16), (1, 16) | (16, 16):
            return here[0] == 10
    return False


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether the rows of codes (M, ...) and (N, ...) are whole 16 bytes and N is a multiple of 16."""
    return a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and min(*a.shape, *b.shape) > 0


def scaled_gemm(a: Side, b: Side, *, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Multiply codes, on a device that `served` names.

    Args:
        a, b: (M, K) and (N, K).
        dtype: of the result, bfloat16 unless scales are of whole tensors.
        fast: fewer bits in the sums.

    Returns: (M, N).
    """
    first, second = _handed(a), _handed(b)
    if b.block == "row":
        second = (second[0], [b.scales.t().contiguous()], *second[2:])
    return F.scaled_mm(  # type: ignore[attr-defined]
        first[0],
        second[0].t(),
        first[1],
        first[2],
        second[1],
        second[2],
        swizzle_a=first[3],
        swizzle_b=second[3],
        output_dtype=dtype,
        use_fast_accum=fast,
    )


def tiled(scales: Tensor) -> Tensor:
    """Scales (R, C) of blocks in the order of tensor cores, flat.

    Tiles of 128 rows and 4 columns follow each other along the rows of tiles; in a tile come row 0, 32, 64, 96, then
    1, 33, ..., with 4 columns each. What is missing to whole tiles is zero.
    """
    R, C = scales.shape
    bits = F.pad(scales.view(torch.uint8), (0, -C % 4, 0, -R % 128))
    tiles = bits.view(bits.shape[0] // 128, 4, 32, bits.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def _handed(side: Side) -> tuple[Tensor, list[Tensor], list[Any], list[Any]]:
    """Codes, scales, kinds of scales and their order, as scaled_mm takes them."""
    from torch.nn.functional import ScalingType, SwizzleType  # type: ignore[attr-defined]

    codes, scales, block, plain = side.codes.contiguous(), side.scales, side.block, [SwizzleType.NO_SWIZZLE]
    if block is None:
        return codes, [scales], [ScalingType.TensorWise], plain
    if block == "row":
        return codes, [scales.contiguous()], [ScalingType.RowWise], plain
    if block == (1, 128):
        return codes, [scales.t().contiguous().t()], [ScalingType.BlockWise1x128], plain
    if block == (128, 128):
        return codes, [F.pad(scales, (0, -scales.shape[1] % 4)).t()], [ScalingType.BlockWise128x128], plain
    if block == (1, 32):
        order = [SwizzleType.SWIZZLE_32_4_4]
        return codes, [tiled(scales.view(torch.float8_e8m0fnu))], [ScalingType.BlockWise1x32], order
    assert side.descale is not None
    scales = scales.view(torch.uint8).repeat_interleave(codes.shape[0] // scales.shape[0], 0).view(scales.dtype)
    kinds = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return codes.view(torch.float4_e2m1fn_x2), [tiled(scales), side.descale], kinds, order
