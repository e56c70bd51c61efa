"""Linear layers of ternary weights and int8 activations, in whole numbers: BitNet b1.58 as it is run, not trained.

    c = clamp(round(x s), -128, 127),  s = 127 / max(max |x|, 1e-5) per row of x        (ops/quant.py, as in training)
    y[n] = (sum over k of c[k] w[n, k]) * (scale[n] * (1 / s)) + b[n],    w in {-1, 0, 1}

Shapes   N outputs, K inputs. Packed weights are (N, 64 ceil(K / 256)) uint8: 64 bytes hold 256 columns of a row, byte j
         columns j, 64 + j, 128 + j and 192 + j from its low bits up, each as its value + 1; columns past K are 0.
Numbers  the sum is exact (K up to 132,104 in float32's whole numbers), and it is the one that training's rounded
         operands would give without rounding; then three float32 roundings: 1 / s, its product with the scale, and
         the product with the sum. Scales are one per output, float32.
Source   Ma et al. 2025, arXiv:2504.12285 section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves, triton_serves
from plait.ops.quant import quantize_int8

# columns whose codes share 64 bytes
BLOCK = 256
# sums of more products may leave the whole numbers of float32
_EXACT = 2**24 // 127


def packed_width(d_in: int) -> int:
    """Bytes of a packed row of d_in codes."""
    return -(-d_in // BLOCK) * (BLOCK // 4)


def pack_ternary(codes: Tensor) -> Tensor:
    """(N, K) of -1, 0, 1 into (N, 64 ceil(K / 256)) uint8; layout in the file's docstring."""
    fields = F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[-1] % BLOCK), value=1).unflatten(
        -1, (-1, 4, BLOCK // 4)
    )
    a, b, c, d = fields.unbind(-2)
    return (a | b << 2 | c << 4 | d << 6).flatten(-2)


def unpack_ternary(packed: Tensor, d_in: int) -> Tensor:
    """The (N, d_in) int8 codes -1, 0, 1 that `pack_ternary` took."""
    blocks = packed.unflatten(-1, (-1, BLOCK // 4))
    fields = torch.stack([blocks >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    return fields.flatten(-3).to(torch.int8)[..., :d_in] - 1


@Op
def ternary_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b with x rounded to int8 and W packed; for inference.

    Args:
        x: (..., K) any float dtype.
        codes: (N, 64 ceil(K / 256)) uint8, of `pack_ternary`.
        scales: (N,) float32, what a weight of 1 stands for in each output.
        bias: (N,) or None.

    Returns: (..., N) in x.dtype.
    """
    q, s = quantize_int8(x)
    # whole numbers below 2^24 are exact in float32, whatever the order of the sum
    exact = torch.float32 if x.shape[-1] <= _EXACT else torch.float64
    sums = F.linear(q.to(exact), unpack_ternary(codes, x.shape[-1]).to(exact)).float()
    y = sums * (scales * (1 / s))
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _fits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> bool:
    N, K = codes.shape[0], x.shape[-1]
    stored = codes.dtype == torch.uint8 and scales.dtype == torch.float32
    shapes = codes.shape == (N, packed_width(K)) and scales.shape == (N,)
    held = codes.is_contiguous() and scales.is_contiguous() and codes.device == scales.device == x.device
    return stored and shapes and held and x.numel() > 0 and (bias is None or bias.shape == (N,))


def _triton_takes(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> bool:
    return _fits(x, codes, scales, bias) and triton_serves(x, codes, scales, bias)


@ternary_linear.backend("triton", when=_triton_takes)
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    from plait.kernels.triton import ternary

    return ternary.linear(x, codes, scales, bias)


def _native_takes(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> bool:
    return _fits(x, codes, scales, bias) and native_serves("ternary", x)


@ternary_linear.backend("native", when=_native_takes)
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    from plait.kernels.native import ternary

    return ternary.linear(x, codes, scales, bias)
