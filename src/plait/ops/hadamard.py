"""A random rotation of every 16 neighbours, which spreads an outlier over all of them before they are rounded.

    y = x diag(signs) H / 4;        H[i, j] = (-1)^popcount(i & j),  so H H^T = 16 I

Two operands that are rotated along the dimension they are summed over give the product they gave before.

Shapes   (..., D), D a multiple of 16.
Numbers  float32 inside, rounded to x's dtype. The sums are taken in one order, that every backend keeps: butterflies
         (a + b, a - b) of numbers 1 apart, then 2, 4 and 8 apart, then a quarter of it.
Source   NVIDIA 2025, arXiv:2509.25149 section 4.2; the signs are the fixed ones of TransformerEngine.
"""

import torch
from torch import Tensor

from plait.ops.dispatch import Op, triton_serves

SIZE = 16
# one vector for all layers and the whole run; drawn once, by TransformerEngine
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@Op
def hadamard16(x: Tensor, signs: tuple[int, ...] = SIGNS) -> Tensor:
    """Rotate each 16 numbers of the last dimension.

    Args:
        x: (..., D) any float dtype, D a multiple of 16.
        signs: 16 times 1 or -1.

    Returns: (..., D) in x's dtype.
    Raises: ValueError if 16 does not divide D, or for signs of another kind.
    """
    if x.shape[-1] % SIZE:
        raise ValueError(f"rows of {x.shape[-1]} numbers cannot be rotated by {SIZE}; pad them to a multiple of {SIZE}")
    if not is_signs(signs):
        raise ValueError(f"signs={signs}: give {SIZE} of them, each 1 or -1")
    columns = x.float().unflatten(-1, (-1, SIZE)).unbind(-1)
    y = [column * sign for column, sign in zip(columns, signs, strict=True)]
    for apart in (1, 2, 4, 8):
        y = [y[i ^ apart] - y[i] if i & apart else y[i] + y[i ^ apart] for i in range(SIZE)]
    return (torch.stack(y, dim=-1) * 0.25).reshape(x.shape).to(x.dtype)


def _fits_gpu(x: Tensor, signs: tuple[int, ...] = SIGNS) -> bool:
    whole = x.numel() > 0 and x.shape[-1] % SIZE == 0
    return whole and x.dtype in (torch.float32, torch.bfloat16) and is_signs(signs) and triton_serves(x)


@hadamard16.backend("triton", when=_fits_gpu)
def _(x: Tensor, signs: tuple[int, ...] = SIGNS) -> Tensor:
    from plait.kernels.triton import hadamard

    return hadamard.hadamard16(x, signs)


def is_signs(signs: tuple[int, ...]) -> bool:
    """Whether these are 16 times 1 or -1."""
    return len(signs) == SIZE and all(s in (1, -1) for s in signs)
