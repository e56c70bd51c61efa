"""Softmax cross-entropy of rows of logits on processors, in place; see loss.cpp."""

import torch
from torch import Tensor

from plait.kernels.native.library import call


def cross_entropy_rows(logits: Tensor, targets: Tensor, *, wants_gradient: bool) -> Tensor:
    """Losses (rows,) float32 of contiguous logits (rows, V), which become their own gradient; targets < 0 count not."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    half = logits.dtype == torch.bfloat16
    call("loss", "cross_entropy", half, logits, targets.long().contiguous(), losses, *logits.shape, wants_gradient)
    return losses
