"""Quantisers of BitNet b1.58: ternary weights, int8 activations, and the straight-through gradient.

    weights       m = max(mean |W|, 1e-5);     codes = clamp(round(W / m), -1, 1);          W ~ codes * m
    activations   s = 127 / max(max |x|, 1e-5) over the last dim;  codes = clamp(round(x s), -128, 127);  x ~ codes / s

Numbers  float32 inside, rounding half to even; codes are whole numbers held in float32 or int8.
Source   Ma et al. 2025, arXiv:2504.12285 section 2; Ma et al. 2024, arXiv:2402.17764 equations 1 to 3.
"""

import torch
from torch import Tensor

FLOOR = 1e-5


def quantize_ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to {-1, 0, 1} times its mean magnitude.

    Args:
        w: any shape, any float dtype.

    Returns: codes int8 in w's shape, and descale () float32 so that w ~ codes * descale.
    """
    descale = w.float().abs().mean().clamp(min=FLOOR)
    return (w.float() / descale).round().clamp(-1, 1).to(torch.int8), descale


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels that reach its largest magnitude.

    Args:
        x: (..., D) any float dtype.

    Returns: codes int8 in x's shape, and scale (..., 1) float32 so that x ~ codes / scale.
    """
    scale = 127.0 / x.float().abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    return (x.float() * scale).round().clamp(-128, 127).to(torch.int8), scale


def fake_ternary(w: Tensor) -> Tensor:
    """w as its ternary codes say, in w's shape and dtype; gradients pass as if nothing had happened."""
    codes, descale = quantize_ternary(w.detach())
    return w + ((codes * descale).to(w.dtype) - w).detach()


def fake_int8(x: Tensor) -> Tensor:
    """x as its int8 codes say, in x's shape and dtype; gradients pass as if nothing had happened."""
    codes, scale = quantize_int8(x.detach())
    return x + ((codes / scale).to(x.dtype) - x).detach()
