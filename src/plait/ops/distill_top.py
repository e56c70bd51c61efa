"""What a student loses against the k likeliest next tokens of a teacher, as they were kept on a disk, and all the rest.

    p_1 .. p_k      the teacher's likeliest tokens, at temperature tau;    p_rest = 1 - sum p_i, the mass of its tail
    q_1 .. q_k      the student's probabilities of these tokens;           q_rest = 1 - sum q_i
    kl_t = tau^2 ( sum_i p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest) )
    d kl / d z_v = tau (q_v - p~_v),    p~_v = p_v for a kept token,   p_rest q_v / q_rest for one of the tail

The tail is one token more: it is neither cut off, which would teach the student that rare tokens never come, nor spread
evenly. How the student divides its tail is its own affair (cross-entropy still teaches it), how much it holds is not.
The value is the divergence of two distributions over k + 1 outcomes: never negative, never above that over the whole
vocabulary, equal to it for k = V, and zero only where the student agrees on every kept token.

Shapes   T tokens, D width of the student, V vocabulary, K tokens kept.
Numbers  those of ops/distill.py; the teacher's k + 1 probabilities are made to sum to one again after their rounding.
Source   written down here; Muralidharan et al. 2024, arXiv:2407.14679 for what it comes close to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op
from plait.ops.distill import ScoreRows, Taught, check_mixture, in_slices
from plait.ops.loss import IGNORED, check_targets, wide

# log of no probability at all
NOTHING = -1e30


@Op
def top_distillation(
    h: Tensor,
    w: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    share: float = 1.0,
    scale: float | Tensor = 1.0,
) -> Taught:
    """Summed loss of a student against kept answers. This body is the reference: it holds all logits.

    Args:
        h: (T, D) final hidden states of the student.
        w: (V, D) its head.
        ids: (T, K) integers, the teacher's likeliest tokens; no token twice in a row.
        log_p: (T, K) their log-probabilities, at `temperature`.
        log_rest: (T,) log of the mass of all others, -inf for none.
        targets: (T,) int64 the token each position must predict; -100 is left out of both parts.
        temperature, share, scale: see `distillation`.

    Returns: see Taught; in nats.
    Raises: ValueError for answers to other tokens or of a larger vocabulary, a temperature or share outside its range,
        or a target outside the vocabulary.
    """
    _check(h, w, ids, log_p, log_rest, targets, temperature, share)
    counted = targets != IGNORED
    z = (h @ w.to(h.dtype).T).to(wide(h))
    kept, log_all = ids.long(), _normal(log_p, log_rest, z.dtype)
    log_q = (z / temperature).log_softmax(-1)
    # not -inf, of which a tail of no token would be all, without a gradient
    tail = log_q.scatter(1, kept, NOTHING).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, kept), tail], 1)
    kl = _divergence(log_all, log_q)[counted].sum() * temperature**2 * scale
    ce = F.cross_entropy(z, targets, ignore_index=IGNORED, reduction="sum") * scale
    return Taught(share * kl + (1 - share) * ce, ce.detach(), kl.detach())


@top_distillation.backend("sliced", when=lambda *args, **kwargs: True)
def _(
    h: Tensor,
    w: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    share: float = 1.0,
    scale: float | Tensor = 1.0,
) -> Taught:
    _check(h, w, ids, log_p, log_rest, targets, temperature, share)

    def score_of(part: slice) -> ScoreRows:
        told = ids[part], log_p[part], log_rest[part], targets[part]
        return lambda z, rows: _block(z, *(one[rows] for one in told), temperature=temperature, share=share)

    return in_slices(h, w, score_of, share, scale)


def _block(
    z: Tensor, ids: Tensor, log_p: Tensor, log_rest: Tensor, targets: Tensor, *, temperature: float, share: float
) -> Tensor:
    """Summed (cross-entropy, divergence) of a few rows, whose logits z become d loss / d z, zero where left out."""
    left_out = targets == IGNORED
    target = targets.masked_fill(left_out, 0)[:, None]
    logits = z.to(wide(z))
    log_hard = logits.log_softmax(-1)
    ce = -log_hard.gather(1, target)[:, 0].masked_fill(left_out, 0.0).sum()
    log_q = log_hard if temperature == 1 else (logits / temperature).log_softmax(-1)
    kept, log_all = ids.long(), _normal(log_p, log_rest, logits.dtype)
    tail = log_q.scatter(1, kept, NOTHING).logsumexp(-1, keepdim=True)
    kl = _divergence(log_all, torch.cat([log_q.gather(1, kept), tail], 1)).masked_fill(left_out, 0.0)
    taught = (log_q + (log_all[:, -1:] - tail)).exp_().scatter_(1, kept, log_all[:, :-1].exp())
    gradient = (log_q.exp() - taught) * (share * temperature)
    if share < 1:
        hard = log_hard.exp()
        hard.scatter_add_(1, target, hard.new_full(target.shape, -1.0))
        gradient = torch.add(gradient, hard, alpha=1 - share)
    z.copy_(gradient.masked_fill_(left_out[:, None], 0.0))
    return torch.stack([ce, kl.sum() * temperature**2])


def _normal(log_p: Tensor, log_rest: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, K + 1) log-probabilities that sum to one, the tail last."""
    return torch.cat([log_p, log_rest[:, None]], 1).to(dtype).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(T,) sum p (log p - log q), nothing where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _check(
    h: Tensor,
    w: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_rest: Tensor,
    targets: Tensor,
    temperature: float,
    share: float,
) -> None:
    T = h.shape[0]
    if ids.dim() != 2 or ids.shape[0] != T or log_p.shape != ids.shape or log_rest.shape != (T,):
        shapes = f"ids {tuple(ids.shape)}, log_p {tuple(log_p.shape)}, log_rest {tuple(log_rest.shape)}"
        raise ValueError(f"the student read {T} tokens, the answers are {shapes}; keep answers to the same tokens")
    if ids.numel() and not ids.is_cuda and int(ids.max()) >= w.shape[0]:
        raise ValueError(
            f"the teacher's token {int(ids.max())} is outside the student's vocabulary of {w.shape[0]}: "
            "both must speak the same vocabulary"
        )
    check_mixture(temperature, share)
    check_targets(h, targets, w.shape[0])
