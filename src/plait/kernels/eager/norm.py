"""RMS norms with hand-written backward passes that keep one number per row instead of whole tensors.

With r = 1 / sqrt(mean(u^2) + eps) and h = dy w:   du = r h - u r^3 mean(u h)

Shapes   (..., G, D / G): statistics over the last dimension.
Numbers  float32 inside (float64 for float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Ctx = torch.autograd.function.FunctionCtx


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    mean = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(u.shape[-1])
    return mean.add_(eps).rsqrt_()


def _backward(u: Tensor, r: Tensor, h: Tensor) -> Tensor:
    """du from u, r and h = dy w; overwrites h."""
    slope = (u * h).sum(-1, keepdim=True).mul_(r.pow(3)).div_(-u.shape[-1])
    return h.mul_(r).addcmul_(u, slope)


class RMSNorm(torch.autograd.Function):
    """y = apply(x, w, eps)."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        u = x.to(torch.promote_types(x.dtype, torch.float32))
        r = _inverse_rms(u, eps)
        ctx.save_for_backward(x, w, r)
        return (u * r).mul_(w.to(u.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        u, g = x.to(r.dtype), dy.to(r.dtype)
        dw = (u * r).mul_(g).flatten(0, -2).sum(0)
        return _backward(u, r, g * w.to(r.dtype)).to(x.dtype), dw.to(w.dtype), None


class GatedRMSNorm(torch.autograd.Function):
    """y = apply(x, z, w, groups, eps), normalising x * silu(z)."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, z: Tensor, w: Tensor, groups: int, eps: float) -> Tensor:
        f32 = torch.promote_types(z.dtype, torch.float32)
        u = F.silu(z.to(f32)).mul_(x).unflatten(-1, (groups, -1))
        r = _inverse_rms(u, eps)
        ctx.save_for_backward(x, z, w, r)
        return u.mul_(r).flatten(-2).mul_(w.to(f32)).to(z.dtype)

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        f32, groups = r.dtype, r.shape[-2]
        g, z_f = dy.to(f32), z.to(f32)
        s = F.silu(z_f)
        u = (s * x).unflatten(-1, (groups, -1))
        dw = (u * r).flatten(-2).mul_(g).flatten(0, -2).sum(0)
        du = _backward(u, r, (g * w.to(f32)).unflatten(-1, (groups, -1))).flatten(-2)
        dz = torch.ops.aten.silu_backward(du * x, z_f)
        return du.mul_(s).to(x.dtype), dz.to(z.dtype), dw.to(w.dtype), None, None
