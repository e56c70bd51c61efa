"""Causal depthwise convolution with SiLU: one multiply-add over the sequence per tap, forward and backward.

Shapes   B batch, L time, D channels, W taps.
Numbers  float32 inside (float64 for float64); the value before SiLU is kept for backward in x.dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalConv(torch.autograd.Function):
    """y = apply(padded, w, bias, starts, activation); padded (B, W - 1 + L, D) begins with the inputs before."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        padded: Tensor,
        w: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        activation: bool,
    ) -> Tensor:
        W, f32 = w.shape[1], torch.promote_types(padded.dtype, torch.float32)
        taps, p = w.to(f32).unbind(1), padded.to(f32)
        L = p.shape[1] - W + 1
        same = _same_document(starts, W)
        y = p[:, W - 1 :] * taps[-1] if bias is None else torch.addcmul(bias.to(f32), p[:, W - 1 :], taps[-1])
        for j in range(W - 1):
            past = p[:, j : j + L]
            y.addcmul_(past if same is None else torch.where(same[j], past, 0.0), taps[j])
        pre = y.to(padded.dtype) if activation else None
        ctx.save_for_backward(padded, w, bias, starts, pre)  # type: ignore[arg-type]
        return (F.silu(y, inplace=pre is not y) if activation else y).to(padded.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        padded, w, bias, starts, pre = ctx.saved_tensors  # type: ignore[attr-defined]
        W, f32 = w.shape[1], torch.promote_types(padded.dtype, torch.float32)
        taps, p = w.to(f32).unbind(1), padded.to(f32)
        L = p.shape[1] - W + 1
        g = dy.to(f32)
        if pre is not None:
            g = torch.ops.aten.silu_backward(g, pre.to(f32))
        dp, dw, product = torch.zeros_like(p), [], torch.empty_like(g)
        same = _same_document(starts, W)
        for j in range(W):
            gj = g if same is None or j == W - 1 else torch.where(same[j], g, 0.0)
            dp[:, j : j + L].addcmul_(gj, taps[j])
            dw.append(torch.mul(gj, p[:, j : j + L], out=product).sum((0, 1)))
        dbias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
        return dp.to(padded.dtype), torch.stack(dw, 1).to(w.dtype), dbias, None, None


def _same_document(starts: Tensor | None, W: int) -> list[Tensor] | None:
    """For each tap but the last: (B, L, 1) bool, whether the token it meets is in the current token's document."""
    if starts is None:
        return None
    document = F.pad(starts.long().cumsum(1), (W - 1, 0))
    L = starts.shape[1]
    return [(document[:, j : j + L] == document[:, W - 1 :])[..., None] for j in range(W - 1)]
