"""Causal depthwise convolution with SiLU on processors: reads its input once each way; see conv.cpp.

Shapes   B batch, L time, D channels, W taps; x may be a slice of wider rows.
Numbers  float32 inside; x, past and y all float32 or all bfloat16.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.native.library import call

Ctx = torch.autograd.function.FunctionCtx
MOST_TAPS = 16


class CausalConv(torch.autograd.Function):
    """y = apply(x, past, w, bias, starts, activation); past (B, W - 1, D) holds the inputs before, or is None."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        past: Tensor | None,
        w: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        activation: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, past, w, bias, starts)  # type: ignore[arg-type]
        ctx.activation = activation  # type: ignore[attr-defined]
        y = torch.empty(x.shape, dtype=x.dtype)
        half, taps = x.dtype == torch.bfloat16, _taps(w)
        call("conv", "causal_conv", half, x, past, starts, taps, _wide(bias), y, *_sizes(x, w), activation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, past, w, bias, starts = ctx.saved_tensors  # type: ignore[attr-defined]
        activation, threads = ctx.activation, torch.get_num_threads()  # type: ignore[attr-defined]
        dy, dx = dy.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        # without tokens the kernel has nothing to do, and what came before no gradient
        dpast = None if past is None else torch.empty_like(past) if x.shape[1] else torch.zeros_like(past)
        parts = torch.zeros(threads, w.shape[1] + 1, w.shape[0])
        inputs = x, past, starts, _taps(w), _wide(bias), dy
        half = x.dtype == torch.bfloat16
        call(
            *("conv", "causal_conv_backward", half, *inputs, dx, dpast, parts),
            *(*_sizes(x, w), activation, threads),
        )
        sums = parts.sum(0)
        dbias = None if bias is None else sums[-1].to(bias.dtype)
        return dx, dpast, sums[:-1].flip(0).T.to(w.dtype), dbias, None, None


def _taps(w: Tensor) -> Tensor:
    """(W, D) float32, the tap of the current token first."""
    return w.detach().float().T.flip(0).contiguous()


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def _sizes(x: Tensor, w: Tensor) -> tuple[int, ...]:
    return *x.shape, w.shape[1], x.stride(0), x.stride(1)
