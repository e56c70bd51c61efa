"""Causal attention with grouped key/value heads, over padded, packed and cached sequences.

    out_t = sum_s softmax_s( q_t . k_s / sqrt(P) ) v_s     s <= t, s not padding, s in t's document

Query head h reads key/value head h // (H / K). The queries are the last L of S tokens.

Shapes   B batch, L queries, S keys, H query heads, K key/value heads, P head size.
Numbers  PyTorch's scaled_dot_product_attention: softmax in float32, result in q.dtype.
Source   Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op

# masks are built for this many queries at a time, so that their memory grows with S and not with S^2
MASK_BLOCK = 1024


@Op
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """Attend from the last L tokens to all S tokens before and including each.

    Args:
        q: (B, L, H, P).
        k, v: (B, S, K, P), S >= L.
        key_mask: (B, S) bool, False at keys that are padding; what a padding query gives means nothing.
        documents: (B, S) int64 document index of every token; attention stays inside a document.

    Returns: (B, L, H, P) in q.dtype.
    Raises: ValueError if K does not divide H, or S < L.
    """
    (B, L, H, P), (S, K) = q.shape, k.shape[1:3]
    if H % K or S < L:
        raise ValueError(f"attention needs K to divide H and S >= L; got H={H}, K={K}, L={L}, S={S}")
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if L == 1:
        # the query heads of a group become the queries of one head: the cache is read once and never repeated
        mask = None if key_mask is None else key_mask[:, None, None]
        if documents is not None:
            same = (documents == documents[:, -1:])[:, None, None]
            mask = same if mask is None else mask & same
        out = F.scaled_dot_product_attention(q.view(B, K, H // K, P), k, v, attn_mask=mask)
        return out.reshape(B, 1, H, P)
    q = q.transpose(1, 2)
    grouped = H != K
    if key_mask is None and documents is None and L == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    blocks = []
    for first in range(0, L, MASK_BLOCK):
        last = min(first + MASK_BLOCK, L)
        end = S - L + last  # later keys are invisible to this block
        mask = _visible(S - L + first, end, q.device, key_mask, documents)
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=grouped
            )
        )
    return torch.cat(blocks, 2).transpose(1, 2)


def _visible(first: int, end: int, device: torch.device, key_mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """(B or 1, 1, end - first, end) bool: which keys the queries first .. end - 1 may see."""
    positions = torch.arange(end, device=device)
    seen = (positions <= positions[first:, None])[None]
    if documents is not None:
        seen = seen & (documents[:, first:end, None] == documents[:, None, :end])
    if key_mask is not None:
        # a padding query sees itself, so that no row of the softmax is empty
        seen = seen & (key_mask[:, None, :end] | (positions == positions[first:, None]))
    return seen[:, None]
