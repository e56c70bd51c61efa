"""Cross-entropy of next-token prediction that never holds (tokens x vocabulary) in float32.

    loss = sum_t weight_t * ( logsumexp_v(h_t . w_v) - h_t . w_target )

The head's product, its softmax and its gradients are formed for one slice of tokens at a time. The gradients are taken
in the forward pass, where the probabilities are at hand, and only scaled in the backward pass.

Shapes   T tokens, D width, V vocabulary.
Numbers  products in h.dtype, softmax and sums in float32; the weight's gradient is accumulated in float32.
Source   Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy), with slices of tokens instead of a kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from plait.ops.dispatch import Op

IGNORED = -100
# a slice holds at most this many logits: 64 MiB in float32
SLICE_LOGITS = 1 << 24


@Op
def linear_cross_entropy(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """Summed cross-entropy of a linear head. This body is the reference: it holds all logits.

    Args:
        h: (T, D) final hidden states.
        w: (V, D) head.
        targets: (T,) int64 the token each position must predict; -100 is left out.
        scale: multiplies the sum, e.g. 1 / number of counted tokens for the mean.

    Returns: scalar float32, in nats.
    Raises: ValueError at once for a target outside 0 .. V - 1 that is not -100.
    """
    _check(targets, w.shape[0])
    logits = h @ w.to(h.dtype).T
    return F.cross_entropy(logits.to(_wide(h)), targets, ignore_index=IGNORED, reduction="sum") * scale


@linear_cross_entropy.backend("sliced", when=lambda *args, **kwargs: True)
def _sliced(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    _check(targets, w.shape[0])
    return _SlicedCrossEntropy.apply(h, w, targets) * scale


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        V = w.shape[0]
        w_low, f32 = w.to(h.dtype), _wide(h)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        wants_dw = ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        dw = torch.zeros(w.shape, dtype=f32, device=w.device) if wants_dw else None
        total = torch.zeros((), dtype=f32, device=h.device)
        for rows in torch.arange(h.shape[0], device=h.device).split(max(SLICE_LOGITS // V, 1)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            counted = targets[part] != IGNORED
            target = torch.where(counted, targets[part], 0)[:, None]
            logits = (h[part] @ w_low.T).to(f32)
            lse = logits.logsumexp(-1)
            total += ((lse - logits.gather(1, target)[:, 0]) * counted).sum()
            if dh is None and dw is None:
                continue
            # d loss / d logits = softmax - one-hot, zero where the target is left out; built in place of the logits
            p = logits.sub_(lse[:, None]).exp_()
            p.scatter_add_(1, target, -torch.ones_like(target, dtype=p.dtype)).mul_(counted[:, None])
            p_low = p.to(h.dtype)
            if dh is not None:
                torch.mm(p_low, w_low, out=dh[part])
            if dw is not None:
                dw += p_low.T @ h[part]
        ctx.save_for_backward(dh, dw)  # type: ignore[attr-defined]
        ctx.dtype = w.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            None if dh is None else (dh * grad).to(dh.dtype),
            None if dw is None else (dw * grad).to(ctx.dtype),  # type: ignore[attr-defined]
            None,
        )


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _check(targets: Tensor, V: int) -> None:
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= V))
    if wrong.any():
        raise ValueError(f"target {int(targets[wrong][0])} is outside the vocabulary of {V}; use -100 to leave one out")
