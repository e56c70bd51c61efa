"""Loss and gradient of a slice of logits on a GPU: each row is read twice and overwritten once.

    loss_t = logsumexp_v(x_t) - x_t,target        x_tv <- exp(x_tv - logsumexp) - [v = target]

One program takes one row and walks over the vocabulary in blocks: first for the running maximum and sum, then, if the
gradient is wanted, to put it in the place of the logits. A row that is left out has neither loss nor gradient. Nothing
is asked of the GPU: a target outside the vocabulary makes its row's loss no number.
"""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["cross_entropy_rows"] = {"BLOCK": 4096, "num_warps": 8, "num_stages": 2}


@triton.jit
def _rows_kernel(
    x_ptr, targets_ptr, loss_ptr, stride, V, BLOCK: tl.constexpr, IGNORED: tl.constexpr, GRADIENT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counted = target != IGNORED
    known = (target >= 0) & (target < V)
    # read before any other warp may have put the gradient in its place
    of_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    cols = tl.arange(0, BLOCK)
    m = float("-inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        x = tl.load(x_ptr + first + cols, mask=first + cols < V, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - new_m) + tl.sum(tl.exp(x - new_m), 0)
        m = new_m
    lse = m + tl.log(total)
    tl.store(loss_ptr + row, tl.where(counted, lse - of_target, 0.0))
    if GRADIENT:
        for first in range(0, V, BLOCK):
            at = first + cols
            x = tl.load(x_ptr + at, mask=at < V, other=0.0).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(at == target, 1.0, 0.0)
            p = tl.where(counted, p, 0.0)
            tl.store(x_ptr + at, p.to(x_ptr.dtype.element_ty), mask=at < V)


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignored: int, *, wants_gradient: bool) -> Tensor:
    """Loss of each row of (T, V) logits, float32; the logits become their gradient if that is wanted."""
    T, V = logits.shape
    loss = torch.empty(T, dtype=torch.float32, device=logits.device)
    if logits.stride(1) != 1:
        raise ValueError("logits must be contiguous in their last dimension")
    if T:
        _rows_kernel[(T,)](
            *(logits, targets.contiguous(), loss, logits.stride(0), V),
            IGNORED=ignored,
            GRADIENT=wants_gradient,
            **config("cross_entropy_rows", V=V),
        )
    return loss
