"""What a student loses against a teacher's distribution over the next token, mixed with plain cross-entropy.

    p = softmax(z_teacher / tau)         q = softmax(z / tau)         z = h W^T, z_teacher = g V^T
    kl_t = tau^2 sum_v p_v (log p_v - log q_v)                        ce_t = -log softmax(z_t)[target_t]
    loss = scale * sum_t ( share kl_t + (1 - share) ce_t )
    d loss / d z = scale * ( share tau (q - p) + (1 - share) (softmax(z) - one-hot) )

The sum is over the whole vocabulary, forward KL: the student is to be likely wherever the teacher is. tau^2 keeps the
gradient's size for any temperature. Both products, both softmaxes and the gradients are formed for one slice of tokens
at a time; the gradients are taken in the forward pass and only scaled in the backward pass.

Shapes   T tokens, D and G widths of student and teacher, V vocabulary.
Numbers  products in h.dtype and g.dtype, softmax and sums in float32 (float64 for float64); dW is summed in float32.
Source   Hinton et al. 2015, arXiv:1503.02531 section 2; Muralidharan et al. 2024, arXiv:2407.14679 (forward KL alone).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from plait.ops.dispatch import Op
from plait.ops.loss import BLOCK_LOGITS, IGNORED, SLICE_LOGITS, add_product, check_targets, slices, wide


class Taught(NamedTuple):
    """loss () differentiable; cross_entropy () and divergence (), its parts before they are mixed, times the scale."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


@Op
def distillation(
    h: Tensor,
    w: Tensor,
    g: Tensor,
    v: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    share: float = 1.0,
    scale: float | Tensor = 1.0,
) -> Taught:
    """Summed loss of a student against a teacher. This body is the reference: it holds all logits of both.

    Args:
        h: (T, D) final hidden states of the student.
        w: (V, D) its head.
        g: (T, G) final hidden states of the teacher; no gradient reaches it.
        v: (V, G) its head.
        targets: (T,) int64 the token each position must predict; -100 is left out of both parts.
        temperature: tau, above 0.
        share: of the divergence in the loss, the rest is cross-entropy.
        scale: multiplies the sums, e.g. 1 / number of counted tokens for means.

    Returns: see Taught; in nats.
    Raises: ValueError for vocabularies or tokens that differ, a temperature or share outside its range, or a target
        outside the vocabulary.
    """
    _check(h, w, g, v, targets, temperature, share)
    counted = targets != IGNORED
    z, teacher = ((a @ b.to(a.dtype).T).to(wide(a)) for a, b in ((h, w), (g.detach(), v.detach())))
    logq, logp = (t.div(temperature).log_softmax(-1) for t in (z, teacher))
    kl = (logp.exp() * (logp - logq)).sum(-1)[counted].sum() * temperature**2 * scale
    ce = F.cross_entropy(z, targets, ignore_index=IGNORED, reduction="sum") * scale
    return Taught(share * kl + (1 - share) * ce, ce.detach(), kl.detach())


@distillation.backend("sliced", when=lambda *args, **kwargs: True)
def _(
    h: Tensor,
    w: Tensor,
    g: Tensor,
    v: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    share: float = 1.0,
    scale: float | Tensor = 1.0,
) -> Taught:
    _check(h, w, g, v, targets, temperature, share)
    g, v_low = g.detach(), v.detach().to(g.dtype)

    def score_of(part: slice) -> ScoreRows:
        teacher = g[part] @ v_low.T
        return lambda z, rows: _block(z, teacher[rows], targets[part][rows], temperature, share)

    return in_slices(h, w, score_of, share, scale)


# logits of a few rows and which rows of the slice they are -> summed (cross-entropy, divergence); the logits become
# d loss / d logits
ScoreRows = Callable[[Tensor, slice], Tensor]


def in_slices(
    h: Tensor, w: Tensor, score_of: Callable[[slice], ScoreRows], share: float, scale: float | Tensor
) -> Taught:
    """The loss of a head whose logits exist for one slice of tokens at a time.

    Args:
        h, w, share, scale: of `distillation`.
        score_of: asked once for each slice of tokens, says what scores its rows.
    """
    # inside the function, a parameter asks for its gradient even when nobody will want it
    wants = torch.is_grad_enabled()
    wanted = (wants and h.requires_grad, wants and w.requires_grad)
    loss, ce, kl = _Sliced.apply(h, w, score_of, share, *wanted)  # type: ignore[misc]
    return Taught(loss * scale, ce * scale, kl * scale)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        w: Tensor,
        score_of: Callable[[slice], ScoreRows],
        share: float,
        wants_dh: bool,
        wants_dw: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w_low = w.to(h.dtype)
        dh = torch.empty_like(h) if wants_dh else None
        dw = torch.zeros(w.shape, dtype=wide(h), device=w.device) if wants_dw else None
        # cross-entropy and divergence
        sums = torch.zeros(2, dtype=wide(h), device=h.device)
        for part in slices(h.shape[0], SLICE_LOGITS // w.shape[0]):
            z, score = h[part] @ w_low.T, score_of(part)
            # the softmaxes of a few rows stay in a CPU's cache; their gradient takes the place of the student's logits
            for rows in slices(z.shape[0], (BLOCK_LOGITS if z.is_cpu else SLICE_LOGITS) // z.shape[1]):
                sums += score(z[rows], rows)
            if dh is not None:
                torch.mm(z, w_low, out=dh[part])
            if dw is not None:
                add_product(dw, z.T, h[part])
        ctx.save_for_backward(dh, dw)  # type: ignore[attr-defined]
        ctx.dtype = w.dtype  # type: ignore[attr-defined]
        ce, kl = sums.unbind()
        loss = share * kl + (1 - share) * ce
        ce, kl = ce.clone(), kl.clone()
        ctx.mark_non_differentiable(ce, kl)  # type: ignore[attr-defined]
        return loss, ce, kl

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            None if dh is None else (dh * grad).to(dh.dtype),
            None if dw is None else (dw * grad).to(ctx.dtype),  # type: ignore[attr-defined]
            *(None,) * 4,
        )


def _block(z: Tensor, teacher: Tensor, targets: Tensor, temperature: float, share: float) -> Tensor:
    """Summed (cross-entropy, divergence) of a few rows, whose logits z become d loss / d z, zero where left out."""
    left_out = targets == IGNORED
    target = targets.masked_fill(left_out, 0)[:, None]
    logits = z.to(wide(z))
    log_hard = logits.log_softmax(-1)
    ce = -log_hard.gather(1, target)[:, 0].masked_fill(left_out, 0.0).sum()
    logq = log_hard if temperature == 1 else (logits / temperature).log_softmax(-1)
    logp = (teacher.to(logits.dtype) / temperature).log_softmax(-1)
    p = logp.exp()
    kl = (p * (logp - logq)).sum(-1).masked_fill(left_out, 0.0).sum() * temperature**2
    gradient = (logq.exp() - p) * (share * temperature)
    if share < 1:
        hard = log_hard.exp()
        hard.scatter_add_(1, target, hard.new_full(target.shape, -1.0))
        gradient = torch.add(gradient, hard, alpha=1 - share)
    z.copy_(gradient.masked_fill_(left_out[:, None], 0.0))
    return torch.stack([ce, kl])


def _check(h: Tensor, w: Tensor, g: Tensor, v: Tensor, targets: Tensor, temperature: float, share: float) -> None:
    if v.shape[0] != w.shape[0] or g.shape[:1] != h.shape[:1]:
        raise ValueError(
            f"student {tuple(h.shape)} over a vocabulary of {w.shape[0]}, teacher {tuple(g.shape)} over {v.shape[0]}: "
            "both must have read the same tokens and speak the same vocabulary"
        )
    check_mixture(temperature, share)
    check_targets(h, targets, w.shape[0])


def check_mixture(temperature: float, share: float) -> None:
    """Raises: ValueError for a temperature or share outside its range."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be above 0; 1 compares the models as they are")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: the divergence's part of the loss lies between 0 and 1")
