"""RMS norms on processors, plain and gated: one pass over memory forward, one backward; see norm.cpp.

Shapes   (..., D) rows; x and z of the gated norm may be slices of wider rows.
Numbers  float32 inside; x, z and y all float32 or all bfloat16.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.native.library import call

Ctx = torch.autograd.function.FunctionCtx


def row_stride(t: Tensor) -> int:
    """Elements from one row of (..., D) to the next when all rows lie evenly, else 0."""
    if t.stride(-1) != 1:
        return 0
    step = t.stride(-2) if t.dim() > 1 else t.shape[-1]
    expected = step
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size > 1 and stride != expected:
            return 0
        expected *= size
    return step


class RMSNorm(torch.autograd.Function):
    """y = apply(x, w, eps) for contiguous x."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        D = x.shape[-1]
        rows, w32 = x.numel() // D, w.detach().float().contiguous()
        y, r = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
        call("norm", "rms_norm", x.dtype == torch.bfloat16, x, w32, y, r, rows, D, float(eps))
        ctx.save_for_backward(x, w, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        dy, dx, threads = dy.contiguous(), torch.empty_like(x), torch.get_num_threads()
        parts, w32 = torch.zeros(threads, w.shape[0]), w.detach().float().contiguous()
        half = x.dtype == torch.bfloat16
        call("norm", "rms_norm_backward", half, x, w32, r, dy, dx, parts, r.shape[0], w.shape[0], threads)
        return dx, parts.sum(0).to(w.dtype), None


class GatedRMSNorm(torch.autograd.Function):
    """y = apply(x, z, w, groups, eps), normalising x * silu(z), group by group."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, z: Tensor, w: Tensor, groups: int, eps: float) -> Tensor:
        D = x.shape[-1]
        rows, w32 = x.numel() // D, w.detach().float().contiguous()
        y = torch.empty(z.shape, dtype=z.dtype)
        r = torch.empty(rows, groups, dtype=torch.float32)
        half, n = x.dtype == torch.bfloat16, D // groups
        strides = row_stride(x), row_stride(z)
        call("norm", "gated_rms_norm", half, x, strides[0], z, strides[1], w32, y, r, rows, groups, n, float(eps))
        ctx.save_for_backward(x, z, w, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        (rows, groups), threads = r.shape, torch.get_num_threads()
        dy = dy.contiguous()
        dx, dz = torch.empty(x.shape, dtype=x.dtype), torch.empty(z.shape, dtype=z.dtype)
        parts, w32 = torch.zeros(threads, w.shape[0]), w.detach().float().contiguous()
        half, n = x.dtype == torch.bfloat16, w.shape[0] // groups
        inputs = x, row_stride(x), z, row_stride(z), w32, r, dy
        call("norm", "gated_rms_norm_backward", half, *inputs, dx, dz, parts, rows, groups, n, threads)
        return dx, dz, parts.sum(0).to(w.dtype), None, None
