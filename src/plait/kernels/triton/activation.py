"""Squared ReLU on GPUs, one pass each way: y = r^2, dx = 2 r dy with r = max(x, 0).

Bytes    forward reads x, writes y; backward reads x and dy, writes dx: 2 and 3 times the tensor, the least there is.
Numbers  float32 inside, one rounding at the end: equal to squaring in the tensor's own format.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["squared_relu"] = {"BLOCK": 4096, "num_warps": 4}


class SquaredReLU(torch.autograd.Function):
    """y = apply(x)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, c = torch.empty_like(x), config("squared_relu")
        _forward[(triton.cdiv(x.numel(), c["BLOCK"]),)](x, y, x.numel(), **c)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        dx, c = torch.empty_like(x), config("squared_relu")
        _backward[(triton.cdiv(x.numel(), c["BLOCK"]),)](x, dy.contiguous(), dx, x.numel(), **c)
        return dx


@triton.jit
def _forward(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    # a comparison, not a maximum: a NaN must stay one
    r = tl.where(x < 0, 0.0, x)
    tl.store(y_ptr + at, r * r, mask=at < n)


@triton.jit
def _backward(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < n).to(tl.float32)
    tl.store(dx_ptr + at, 2.0 * tl.where(x < 0, 0.0, x) * dy, mask=at < n)
