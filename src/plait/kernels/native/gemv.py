"""Linear layers for a few rows, over weights as they are stored: bfloat16, float32, int8 or int4 codes."""

import torch
from torch import Tensor

from plait.kernels.native.library import call

# rows that one pass over the weights serves; more are the business of matrix products
MOST_ROWS = 16
# weights made into numbers at a time, for many rows: they stay in the cache until they are multiplied
PANEL = 1 << 18
FORMATS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) to (..., N) in x.dtype; w (N, K) float32 or bfloat16. The bits of a row do not depend on the others."""
    return _gemv(x, w, None, None, bias, FORMATS[w.dtype], 0, w.shape[0])


def weight_only(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *, bits: int, group: int
) -> Tensor:
    """(..., K) to (..., N) in x.dtype over codes; many rows meet a panel of weights at a time, in x.dtype."""
    N, K = codes.shape[0], x.shape[-1]
    if x.numel() <= MOST_ROWS * K:
        return _gemv(x, codes, scales, zeros, bias, FORMATS[bits], group, N)
    y = x.new_empty(*x.shape[:-1], N)
    step = max(1, PANEL // K)
    panel = x.new_empty(min(step, N), K)
    for n in range(0, N, step):
        rows = slice(n, min(n + step, N))
        some = panel[: rows.stop - n]
        points = None if zeros is None else zeros[rows]
        half = int(x.dtype == torch.bfloat16)
        call(
            "gemv", "dequantize", codes[rows], scales[rows], points, FORMATS[bits], group, rows.stop - n, K, half, some
        )
        y[..., rows] = torch.nn.functional.linear(x, some, None if bias is None else bias[rows].to(x.dtype))
    return y


def _gemv(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    kind: int,
    group: int,
    N: int,
) -> Tensor:
    x = x.contiguous()
    K, half = x.shape[-1], x.dtype == torch.bfloat16
    y = x.new_empty(*x.shape[:-1], N)
    bias = None if bias is None else bias.to(x.dtype)
    call("gemv", "gemv", w, scales, zeros, kind, group, N, K, half, half, x, x.numel() // K, bias, y)
    return y
