"""Squared ReLU that keeps one tensor for its backward pass: y = r^2, dx = 2 r dy with r = max(x, 0)."""

import torch
import torch.nn.functional as F
from torch import Tensor


class SquaredReLU(torch.autograd.Function):
    """y = apply(x)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:  # type: ignore[override]
        (r,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (r * dy).mul_(2.0)
