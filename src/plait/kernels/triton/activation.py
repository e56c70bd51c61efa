"""Squared ReLU and gated activations on GPUs, one pass each way.

    squared ReLU   y = r^2,  dx = 2 r dy                                r = max(x, 0)
    gate           y = a(g) x,  dx = a(g) dy,  dg = a'(g) x dy          a(g) = silu(g), or max(g, 0)^2

Bytes    squared ReLU reads x, writes y; backward reads x and dy, writes dx: 2 and 3 times the tensor; the gate 3 and 5
         times: the least there is.
Numbers  float32 inside, one rounding at the end: for squared ReLU equal to squaring in the tensor's own format.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["squared_relu"] = {"BLOCK": 4096, "num_warps": 4}
DEFAULTS["gate"] = {"BLOCK": 2048, "num_warps": 4}


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


class Gate(torch.autograd.Function):
    """y = apply(g, x, silu): silu(g) x, or relu(g)^2 x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, g: Tensor, x: Tensor, silu: bool) -> Tensor:
        g, x = g.contiguous(), x.contiguous()
        y, c = torch.empty_like(x), config("gate")
        _gate[(triton.cdiv(x.numel(), c["BLOCK"]),)](g, x, y, x.numel(), SILU=silu, **c)
        ctx.save_for_backward(g, x)
        ctx.silu = silu  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        g, x = ctx.saved_tensors  # type: ignore[attr-defined]
        dg, dx, c = torch.empty_like(g), torch.empty_like(x), config("gate")
        grid = (triton.cdiv(x.numel(), c["BLOCK"]),)
        _gate_backward[grid](g, x, dy.contiguous(), dg, dx, x.numel(), SILU=ctx.silu, **c)  # type: ignore[attr-defined]
        return dg, dx, None


@triton.jit
def _gate(g_ptr, x_ptr, y_ptr, n, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < n).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    if SILU:
        a = g * tl.sigmoid(g)
    else:
        a = tl.where(g < 0, 0.0, g)
        a *= a
    tl.store(y_ptr + at, a * x, mask=at < n)


@triton.jit
def _gate_backward(g_ptr, x_ptr, dy_ptr, dg_ptr, dx_ptr, n, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < n).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < n).to(tl.float32)
    if SILU:
        share = tl.sigmoid(g)
        a = g * share
        slope = share + a * (1.0 - share)
    else:
        r = tl.where(g < 0, 0.0, g)
        a = r * r
        slope = 2.0 * r
    tl.store(dx_ptr + at, dy * a, mask=at < n)
    tl.store(dg_ptr + at, dy * x * slope, mask=at < n)
