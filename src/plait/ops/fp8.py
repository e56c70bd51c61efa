"""FP8: numbers of 8 bits with one scale for a tensor, a row, or a tile of it.

    scale = largest / amax            amax = max |x| of what shares the scale; 448 for e4m3, 57344 for e5m2
    code  = cast(x * scale);          x ~ code * descale,  descale = 1 / scale

The order of operations is TransformerEngine's current scaling. A scale that overflows is the largest finite number, and
zeros have scale 1. With power_of_two the scale is rounded down to a power of two, so nothing saturates.

Shapes   R rows, C columns (the last dimension).
Numbers  float32 inside; casts saturate and round to nearest even, or at random. If a number is infinite or NaN, all
         that share its scale decode to NaN: a fault shows and does not spread further.
Source   Nemotron-H 2025, arXiv:2504.03624 section 2.4 (tensor); DeepSeek-V3 2024, arXiv:2412.19437 section 3.3 (tiles).
"""

from typing import Literal

import torch
from torch import Tensor

from plait.ops.cast import encode, minifloat
from plait.ops.dispatch import Op, native_serves, triton_serves
from plait.ops.random import uniform

FP8 = Literal["e4m3", "e5m2"]
Block = Literal["row"] | tuple[int, int] | None


@Op
def quantize_fp8(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Block = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round a tensor to FP8 codes; TransformerEngine's order of operations.

    Args:
        x: (..., R, C) any float dtype; one dimension is enough unless a tile has several rows.
        element: "e4m3" or "e5m2".
        block: what shares a scale: None the tensor, "row" each row, (r, c) each tile of r rows and c columns.
        power_of_two: round scales down to powers of two, which makes code * descale exact in bfloat16.
        seed: round at random, with the numbers of `ops.random.uniform` for this seed; None to the nearest.

    Returns: codes float8 in x's shape; descale float32: (), (..., R, 1) or (..., R / r, C / c).
    Raises: ValueError if the tile does not divide x.
    """
    amax = block_amax(x, block)
    scale = fp8_scale(amax, minifloat(element).largest, torch.finfo(x.dtype).max, power_of_two)
    noise = None if seed is None else uniform(x.shape, seed=seed, device=x.device)
    return encode(x.float() * spread(scale, x.shape), element, noise=noise), 1.0 / scale


def _fits(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Block = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> bool:
    if element not in ("e4m3", "e5m2") or not native_serves("quantise", x):
        return False
    from plait.kernels.native import quantise

    return quantise.fits(x, block if isinstance(block, tuple) else None, random=seed is not None)


@quantize_fp8.backend("native", when=_fits)
def _(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Block = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.native import quantise

    m = quantise.matrix(x.detach())
    if isinstance(block, tuple):
        return quantise.codes(m, element, "pow2" if power_of_two else "float32", block, seed=seed)
    amax = quantise.amax(m) if block is None else block_amax(m.meant, block)
    scale = fp8_scale(amax, minifloat(element).largest, torch.finfo(x.dtype).max, power_of_two)
    return quantise.codes(m, element, "given", given=scale, seed=seed)[0], 1.0 / scale


def _fits_gpu(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Block = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> bool:
    tile = block if isinstance(block, tuple) else None
    return element in ("e4m3", "e5m2") and divides(tile, x) and triton_serves(x)


@quantize_fp8.backend("triton", when=_fits_gpu)
def _(
    x: Tensor,
    element: FP8 = "e4m3",
    *,
    block: Block = None,
    power_of_two: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.triton import quant

    x = x.detach()
    if isinstance(block, tuple):
        return quant.codes(x, element, "pow2" if power_of_two else "float32", block, seed=seed)
    amax = quant.amax(x) if block is None else block_amax(x, block)
    scale = fp8_scale(amax, minifloat(element).largest, torch.finfo(x.dtype).max, power_of_two)
    return quant.codes(x, element, "given", given=scale, seed=seed)[0], 1.0 / scale


@Op
def dequantize_fp8(codes: Tensor, descale: Tensor) -> Tensor:
    """The float32 numbers that codes and descale of `quantize_fp8` stand for.

    Args:
        codes: (..., R, C) float8.
        descale: float32, () or of as many dimensions as codes.

    Returns: float32 in codes' shape.
    Raises: ValueError if the shapes of codes and descale do not belong together.
    """
    return codes.float() * spread(descale, codes.shape)


def export_fp8(w: Tensor, *, weight_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight to E4M3 as ModelOpt writes checkpoints for inference engines: one scale, w rounded twice.

    Args:
        w: any shape, any float dtype, not all zeros.
        weight_scale: amax / 448 of all the weights that share it; None takes w's own.

    Returns: codes float8_e4m3fn in w's shape; weight_scale () float32, so that w ~ code * weight_scale.
    """
    if weight_scale is None:
        weight_scale = exact_quotient(block_amax(w, None), minifloat("e4m3").largest)
    return encode((w.float() / weight_scale).to(w.dtype), "e4m3"), weight_scale


def fp8_scale(amax: Tensor, largest: float, limit: float, power_of_two: bool) -> Tensor:
    """The float32 scale of tensors with these largest magnitudes.

    Args:
        amax: float32, any shape; largest: of the element; limit: of the input's dtype, that a scale must not overflow.
        power_of_two: round down to a power of two.
    """
    scale = torch.where(amax == 0, 1.0, exact_quotient(largest, amax).clamp(max=limit))
    if power_of_two:
        power = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale.isnan(), scale, power)
    # infinity or NaN among the numbers: say so in each number that shares the scale
    return torch.where(amax.isfinite(), scale, torch.nan)


def exact_quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, rounded once; one of them is a float32 tensor.

    Torch itself takes number / tensor for number * (1 / tensor), and on GPUs tensor / number for a product too.
    """
    if isinstance(b, Tensor):
        return (a if isinstance(a, Tensor) else torch.full_like(b, a)) / b
    assert isinstance(a, Tensor)
    return a / torch.full_like(a, b)


def block_amax(x: Tensor, block: Block) -> Tensor:
    """Largest magnitudes, float32: () for None, (..., 1) for "row", (..., R / r, C / c) for tiles of (r, c)."""
    a = x.abs()
    if block is None:
        return (a.amax() if a.numel() else a.new_zeros(())).float()
    if block == "row":
        return a.amax(-1, keepdim=True).float()
    rows, columns = check_block(x.shape, block)
    a = a.unflatten(-1, (-1, columns)).amax(-1)
    return (a.unflatten(-2, (-1, rows)).amax(-2) if rows > 1 else a).float()


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the scales of blocks until they multiply a tensor of this shape; ValueError if they cannot."""
    if scale.dim() == 0:
        return scale
    fits = scale.dim() == len(shape) and scale.shape[:-2] == shape[:-2]
    for dim in (-1, -2)[: scale.dim()]:
        n, blocks = shape[dim], scale.shape[dim]
        fits = fits and n % max(blocks, 1) == 0 and (blocks > 0 or n == 0)
        if fits and 1 < blocks < n:
            scale = scale.repeat_interleave(n // blocks, dim)
    if not fits:
        raise ValueError(
            f"scales that do not belong to codes of shape {tuple(shape)}: their dimensions must divide the codes'"
        )
    return scale


def divides(block: tuple[int, int] | None, x: Tensor) -> bool:
    """Whether the fast kernels take x, float32 or bfloat16, in such tiles, whose sides are powers of two up to 128."""
    if not x.numel() or not x.dim() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if block is None:
        return True
    rows, columns = block
    sides = all(side in (1, 16, 32, 64, 128) for side in block)
    return sides and x.shape[-1] % columns == 0 and (rows == 1 or (x.dim() > 1 and x.shape[-2] % rows == 0))


def check_block(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """The tile's sides, if it divides the last two dimensions; else a ValueError that says what to do."""
    rows, columns = block
    if rows < 1 or columns < 1 or len(shape) < 1 + (rows > 1):
        raise ValueError(f"block={block} needs a tensor of {1 + (rows > 1)} dimensions or more; this is {tuple(shape)}")
    if shape[-1] % columns or (rows > 1 and shape[-2] % rows):
        raise ValueError(
            f"block={block} does not divide a tensor of shape {tuple(shape)}: pad its last dimension to a multiple of "
            f"{columns}"
            + (f" and the one before to a multiple of {rows}" if rows > 1 else "")
            + ", or leave it unquantised"
        )
    return rows, columns
