"""The linear layer, y = x W^T + b, at the speed of memory for the few rows that decoding and short prompts have.

Numbers  in x.dtype; sums in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves

# more rows are the business of matrix products; of bfloat16 where the processor multiplies it
FEW, FEW_PAIRS = 8, 128


@Op
def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply every row of x by a matrix.

    Args:
        x: (..., K) any float dtype.
        w: (N, K); bias: (N,) or None; both in x.dtype.

    Returns: (..., N) in x.dtype.
    """
    return F.linear(x, w, bias)


def _has_few_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> bool:
    return (
        x.is_cpu
        and 0 < x.numel() <= FEW_PAIRS * w.shape[-1]
        and not torch.is_grad_enabled()
        and w.dim() == 2
        and x.shape[-1] == w.shape[1]
        and w.is_contiguous()
        and x.dtype == w.dtype
        and (bias is None or (bias.is_contiguous() and bias.shape == w.shape[:1]))
        and native_serves("gemv", x, w, bias)
        and (x.numel() <= FEW * w.shape[-1] or _is_paired(w))
    )


def _is_paired(w: Tensor) -> bool:
    from plait.kernels.native.library import target

    return w.dtype == torch.bfloat16 and w.shape[1] % 32 == 0 and target() == "avx512"


@linear.backend("native", when=_has_few_rows)
def _(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    from plait.kernels.native import gemv

    return gemv.linear(x, w, bias)
