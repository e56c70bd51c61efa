"""Ternary linear layers over packed weights: for few rows as for many."""

import torch
from torch import Tensor

from plait.kernels.native.library import call


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) to (..., N) in x.dtype; arguments are those of `plait.ops.ternary.ternary_linear`."""
    x, K, N = x.contiguous(), x.shape[-1], codes.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    bias = None if bias is None else bias.float().contiguous()
    call("ternary", "ternary", codes, scales, N, K, x.dtype == torch.bfloat16, x, x.numel() // K, bias, y)
    return y
