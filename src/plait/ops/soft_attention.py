"""Causal attention whose logits or weights are bounded, for models that train at high learning rates.

    z_ts = q_t . k_s / sqrt(P)
    z <- cap tanh(z / cap)                                               soft cap
    p_ts = softmax_s(z);   p <- clip((high - low) p + low, 0, 1)         soft clip, (high, low) = (1.03, -0.03)
    out_t = sum_s p_ts v_s                                               s <= t, s not padding, s in t's document

Both need every logit, which the tiled kernels never form. So queries are taken some at a time, and where there are
several such blocks their logits are made a second time in the backward pass: memory does not grow with L S.

Shapes   B batch, L queries, S keys, H query heads, K key/value heads, G = H / K, P head size.
Numbers  products, softmax and sums in float32 (float64 for float64), result in q.dtype.
Source   Gemma team 2024, arXiv:2408.00118 section 2 (cap); Bondarenko et al. 2023, arXiv:2306.12929 section 4 (clip).
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.ops.attention import _visible
from plait.ops.dispatch import Op

# logits that exist at a time, over batch and heads
LOGITS = 1 << 22

Clip = tuple[float, float]


@Op
def soft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cap: float | None = None,
    clip: Clip | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attend from the last L tokens to all S tokens before and including each.

    Args:
        q: (B, L, H, P).
        k, v: (B, S, K, P), S >= L.
        cap: bound of the logits, None for none.
        clip: (high, low) to which the softmax is stretched before it is cut to 0 .. 1; None leaves it.
        key_mask: (B, S) bool, False at keys that are padding; what a padding query gives means nothing.
        documents: (B, S) int64 document index of every token, rising along a row; attention stays inside a document.

    Returns: (B, L, H, P) in q.dtype.
    Raises: ValueError if K does not divide H, or S < L.
    """
    (B, L, H, _), (S, K) = q.shape, k.shape[1:3]
    if H % K or S < L:
        raise ValueError(f"attention needs K to divide H and S >= L; got H={H}, K={K}, L={L}, S={S}")
    # a compiler would unroll the loop, anew for every length
    step = L if torch.compiler.is_compiling() else max(1, LOGITS // max(B * H * S, 1))
    blocks = []
    for first in range(0, L, step):
        last = min(first + step, L)
        end = S - L + last  # later keys are invisible to this block
        seen = _visible(S - L + first, end, q.device, key_mask, documents)
        part = (q[:, first:last], k[:, :end], v[:, :end], seen, cap, clip)
        if step < L and torch.is_grad_enabled():
            blocks.append(checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(attend(*part))
    return torch.cat(blocks, 1)


def soft_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, cap: float | None, clip: Clip | None
) -> Tensor:
    """The same for one token per sequence over a cache with room to spare.

    Args:
        q: (B, 1, H, P).
        k_cache, v_cache: (B, K, S, P); what lies beyond a sequence's end may be anything, even no number.
        lengths: (B,) one past the last key of each sequence.
        cap, clip: see soft_attention.

    Returns: (B, 1, H, P) in q.dtype.
    """
    seen = (torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    v = v_cache.masked_fill(~seen.mT, 0.0).transpose(1, 2)
    return attend(q, k_cache.transpose(1, 2), v, seen, cap, clip)


def extremes(
    q: Tensor,
    k: Tensor,
    *,
    cap: float | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How large the logits are and how spread the weights, without gradients; some queries at a time.

    Args: as of soft_attention, with S = L.

    Returns: largest logit before the cap (H,); mean over tokens of - sum p log p, nats, before a clip (H,).
    """
    B, L, H, _ = q.shape
    step = max(1, LOGITS // (B * H * L))
    largest, entropy = torch.full((H,), -torch.inf, device=q.device), torch.zeros(H, device=q.device)
    for first in range(0, L, step):
        end = min(first + step, L)
        seen = _visible(first, end, q.device, key_mask, documents)
        z = logits(q[:, first:end].detach(), k[:, :end].detach())
        p = weights(z, seen, cap, None)
        largest = torch.maximum(largest, z.masked_fill(~seen[:, :, None], -torch.inf).amax((0, 3, 4)).flatten())
        entropy = entropy + torch.special.entr(p).sum((0, 3, 4)).flatten() / (B * L)
    return largest, entropy


def logits(q: Tensor, k: Tensor) -> Tensor:
    """(B, K, G, L, S), the products q . k / sqrt(P) of (B, L, H, P) and (B, S, K, P), in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    return grouped @ k.to(wide).permute(0, 2, 3, 1)[:, :, None] * q.shape[-1] ** -0.5


def weights(z: Tensor, seen: Tensor, cap: float | None, clip: Clip | None) -> Tensor:
    """What each logit's value is multiplied with, in z's shape; `seen` (B or 1, 1, L, S) bool."""
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    p = z.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    if clip is not None:
        high, low = clip
        p = ((high - low) * p + low).clamp(0.0, 1.0)
    return p


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float | None, clip: Clip | None) -> Tensor:
    """Attention of (B, L, H, P) to the keys (B, S, K, P) that `seen` (B or 1, 1, L, S) shows, all logits at once."""
    p = weights(logits(q, k), seen, cap, clip)
    out = p @ v.to(p.dtype).transpose(1, 2)[:, :, None]  # (B, K, G, L, P)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
