"""Squared ReLU on processors: keeps its input, and makes one pass over memory each way."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.native.library import call


class SquaredReLU(torch.autograd.Function):
    """y = apply(x) for contiguous float32 or bfloat16 x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        call("activation", "squared_relu", x.dtype == torch.bfloat16, x, y, x.numel())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        dy, dx = dy.contiguous(), torch.empty_like(x)
        call("activation", "squared_relu_backward", x.dtype == torch.bfloat16, x, dy, dx, x.numel())
        return dx
