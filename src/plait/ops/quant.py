"""Quantisers: BitNet's ternary weights and int8 activations, and weights held as int8 or int4 codes with group scales.

    weights       s = 1 / max(mean |W|, 1e-5);  codes = clamp(round(W s), -1, 1);            W ~ codes / s
    activations   s = 127 / max(max |x|, 1e-5) over the last dim;  codes = clamp(round(x s), -128, 127);  x ~ codes / s
    groups        w ~ scale * (code - zero), one scale (and zero point) for `group` neighbours of a row; without zero
                  points codes are signed: int8 in -127..127, int4 in -8..7, held as 0..15 with 8 added

Shapes   N outputs, K inputs, a multiple of 64 and of the group. int4: two codes in a byte; byte j of 32 holds columns j
         (low four bits) and 32 + j (high four bits) of its block of 64 columns.
Numbers  float32 inside, rounding half to even; codes are whole numbers. Group scales are float16, and codes are
         computed from the rounded scale. Without zero points, an int4 group's number of largest magnitude has the sign
         of -8, so its scale may be negative; of six scales the one of the smallest squared error is taken.
         Error at most scale / 2, but for int4 numbers that the best scale clips.
         A group of zeros is exact. Scales are at least 2^-24: numbers below 2^-25 become zero. Larger ones than
         65504 * 127 (8 for int4) fit no scale and are refused.
Source   Ma et al. 2025, arXiv:2504.12285 section 2; Ma et al. 2024, arXiv:2402.17764 equations 1 to 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves

FLOOR = 1e-5
# columns of one packed block of int4 codes: the low four bits of 32 bytes, then their high four bits
BLOCK = 64
# where the extreme of a symmetric int4 group may land: -8 uses every code, beyond it the extreme is clipped
EXTREMES = (-8.0, -7.0, -7.5, -8.5, -9.0, -10.0)
_LARGEST, _SMALLEST = 65504.0, 2.0**-24
# numbers quantised at a time: their float32 copies stay in the cache
_AT_ONCE = 1 << 18


def quantize_ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to {-1, 0, 1} times its mean magnitude.

    Args:
        w: any shape, any float dtype.

    Returns: codes int8 in w's shape, and descale () float32 so that w ~ codes * descale.
    """
    scale = 1.0 / w.float().abs().mean().clamp(min=FLOOR)
    return (w.float() * scale).round().clamp(-1, 1).to(torch.int8), 1.0 / scale


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels that reach its largest magnitude.

    Args:
        x: (..., D) any float dtype.

    Returns: codes int8 in x's shape, and scale (..., 1) float32 so that x ~ codes / scale.
    """
    scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    return (x.float() * scale).round().clamp(-128, 127).to(torch.int8), scale


def fake_ternary(w: Tensor) -> Tensor:
    """w as its ternary codes say, in w's shape and dtype; gradients pass as if nothing had happened."""
    codes, descale = quantize_ternary(w.detach())
    return _straight_through((codes * descale).to(w.dtype), w)


def fake_int8(x: Tensor) -> Tensor:
    """x as its int8 codes say, in x's shape and dtype; gradients pass as if nothing had happened."""
    codes, scale = quantize_int8(x.detach())
    return _straight_through((codes / scale).to(x.dtype), x)


def _straight_through(value: Tensor, x: Tensor) -> Tensor:
    # the difference is zero: the value comes out bit for bit, which x + (value - x) would not
    return value + (x - x.detach())


def fits_groups(d_in: int, group: int) -> bool:
    """Whether rows of d_in numbers can be held as codes with such groups."""
    return d_in % BLOCK == 0 and d_in % group == 0


def quantize_groups(w: Tensor, bits: int, group: int, zeros: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix to int8 or int4 codes.

    Args:
        w: (N, K) any float dtype.
        bits: 8 or 4.
        group: neighbours of a row that share a scale.
        zeros: give each group a zero point too, for numbers that are not symmetric about 0.

    Returns: codes, (N, K) int8 (uint8 with zeros) or packed (N, K / 2) uint8 for int4; scales (N, K / group) float16;
        zero points (N, K / group) uint8, or None.
    Raises: ValueError for a shape that does not fit, or numbers that no float16 scale can hold.
    """
    if bits not in (4, 8) or w.dim() != 2 or group < 1 or not fits_groups(w.shape[1], group):
        raise ValueError(
            f"bits={bits}, group={group}, shape {tuple(w.shape)}: bits must be 4 or 8, and the rows of a matrix "
            f"a multiple of {BLOCK} and of the group"
        )
    N, K = w.shape
    code = torch.int8 if bits == 8 and not zeros else torch.uint8
    codes = torch.empty(N, K * bits // 8, dtype=code, device=w.device)
    scales = torch.empty(N, K // group, dtype=torch.float16, device=w.device)
    points = torch.empty(N, K // group, dtype=torch.uint8, device=w.device) if zeros else None
    step = max(1, _AT_ONCE // K)
    for i in range(0, N, step):
        rows = slice(i, i + step)
        w_NGP = w[rows].detach().float().unflatten(1, (-1, group))
        if zeros:
            q, scales[rows], zero = _affine(w_NGP, bits)
            points[rows] = zero  # type: ignore[index]
        else:
            q, scales[rows] = _symmetric_int4(w_NGP) if bits == 4 else _symmetric_int8(w_NGP)
        q = q.flatten(1).to(code)
        codes[rows] = pack_int4(q) if bits == 4 else q
    return codes, scales, points


def dequantize_groups(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int) -> Tensor:
    """The (N, K) float32 weights that codes, scales and zero points of `quantize_groups` stand for."""
    q = (unpack_int4(codes) if bits == 4 else codes).float().unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        q = q - zeros[..., None].float()
    elif bits == 4:
        q = q - 8
    return (q * scales[..., None].float()).flatten(1)


def pack_int4(codes: Tensor) -> Tensor:
    """(N, K) codes 0..15, uint8, into (N, K / 2) bytes; layout in the file's docstring."""
    low, high = codes.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """(N, K / 2) bytes to the (N, K) codes that `pack_int4` took."""
    halves = packed.unflatten(1, (-1, BLOCK // 2))
    return torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)


@Op
def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """y = x W^T + b with W held as codes; for inference.

    Args:
        x: (..., K) any float dtype.
        codes, scales, zeros: (N, K) or packed (N, K / 2), (N, K / group), (N, K / group) or None, of `quantize_groups`.
        bias: (N,) or None.
        bits: 8 or 4.
        group: numbers that share a scale.

    Returns: (..., N) in x.dtype, summed in float32.
    """
    w = dequantize_groups(codes, scales, zeros, bits=bits).to(x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _native_takes(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> bool:
    # groups lie in whole halves of a block, and a kernel has room for so many scales of a row
    fits = group >= BLOCK // 2 and group & (group - 1) == 0 and scales.shape[1] <= 1024 and x.numel() > 0
    stored = (codes, scales) if zeros is None else (codes, scales, zeros)
    if not (fits and all(t.is_cpu and t.is_contiguous() for t in stored) and native_serves("gemv", x, bias)):
        return False
    N, K = codes.shape[0], x.shape[-1]
    agree = codes.shape[1] * 8 == K * bits and all(t.shape == (N, K // group) for t in stored[1:])
    return agree and (bias is None or bias.shape == (N,))


@weight_only_linear.backend("native", when=_native_takes)
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    from plait.kernels.native import gemv

    return gemv.weight_only(x, codes, scales, zeros, bias, bits=bits, group=group)


def _symmetric_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127..127 of (N, G, P) groups, and their (N, G) scales."""
    amax = w.abs().amax(-1)
    _check_range(amax, 127)
    scales = _half_above(amax / 127)
    return _codes(w, scales), scales


def _symmetric_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 (8 stands for 0) of (N, G, P) groups, and the scales of EXTREMES with the smallest squared error."""
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    _check_range(extreme.abs(), 8)
    best, scales, codes = torch.full_like(extreme, torch.inf), torch.zeros_like(extreme), torch.zeros_like(w)
    for end in EXTREMES:
        s = (extreme / end).clamp(-_LARGEST, _LARGEST).half().float()
        # a scale that rounds to zero would lose what the smallest one can still hold
        s = torch.where(s == 0, -extreme.sign() * _SMALLEST, s)
        q = _codes(w, s).clamp_(-8, 7)
        error = torch.addcmul(w, q, s[..., None], value=-1).square_().sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, s, scales)
        codes = torch.where(better[..., None], q, codes)
    return codes.add_(8), scales.half()


def _affine(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. 2^bits - 1 of (N, G, P) groups, their scales and zero points; 0 is always a code of its own."""
    top = 2**bits - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    _check_range(high - low, top)
    scales = _half_above((high - low) / top)
    zeros = _codes(-low[..., None], scales)
    return (_codes(w, scales) + zeros).clamp_(0, top), scales, zeros[..., 0].to(torch.uint8)


def _codes(w: Tensor, scales: Tensor) -> Tensor:
    """w / scale as whole numbers in float32; 0 where the scale is 0, as the group is then."""
    return (w / torch.where(scales == 0, 1.0, scales.float())[..., None]).round_()


def _half_above(x: Tensor) -> Tensor:
    """The smallest float16 that is not below x, so that no number of the group lies beyond the last code."""
    half = x.half()
    above = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(half.float() < x, above, half)


def _check_range(amax: Tensor, codes: int) -> None:
    if not bool((amax <= _LARGEST * codes).all()):
        raise ValueError(
            f"the weights reach {amax.max().item():.4g}, or are no numbers; {_LARGEST * codes:,.0f} is the largest "
            "that a float16 scale can hold; keep this tensor in bfloat16"
        )
