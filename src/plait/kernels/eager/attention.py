"""Attention without masks of queries x keys: over a long past, and inside the documents of packed rows.

Packed rows are cut into their documents, each a causal attention of its own: tokens of other documents cost nothing.
Over a past, a block of queries sees every key before it, and causally the keys of the block. Softmax over both is

    out = (e^a out_a + e^b out_b) / (e^a + e^b)      a, b: logarithms of the two sums of exponentials

Shapes   B batch, L queries, S keys, H query heads, K key/value heads, R = H / K, P head size.
Numbers  inputs in any float dtype; parts in it, sums of exponentials and the merged result in float32.
Source   Dao et al. 2022, arXiv:2205.14135 section 3.1 (merging partial softmaxes).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# queries of a block: the only mask that is ever built is BLOCK x BLOCK, and only where there is padding
BLOCK = 1024


def available() -> bool:
    """Whether this PyTorch has the CPU's tiled attention that also returns the logarithm of its sums."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attend from the last L of S tokens, without gradients; memory of the order of one block, whatever S.

    Args:
        q: (B, L, H, P).
        k, v: (B, S, K, P).
        key_mask: (B, S) bool, False at padding, or None.

    Returns: (B, L, H, P) in q.dtype; anything at padding.
    """
    B, L, H, P = q.shape
    S, K = k.shape[1:3]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = q.new_empty(B, L, H, P)
    for first in range(0, L, BLOCK):
        last = min(first + BLOCK, L)
        begin, end = S - L + first, S - L + last
        piece = q[:, :, first:last]
        mask = None if key_mask is None else key_mask[:, begin:end]
        result, total = _own(piece, k[:, :, begin:end], v[:, :, begin:end], mask)
        if begin:
            mask = None if key_mask is None else key_mask[:, :begin]
            result = _merged(result, total, *_past(piece, k[:, :, :begin], v[:, :, :begin], mask))
        out[:, first:last] = result.transpose(1, 2)
    return out


def by_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention inside each document of packed rows; differentiable.

    Args:
        q: (B, L, H, P).
        k, v: (B, L, K, P).
        documents: (B, L) index of each token's document, rising along a row.

    Returns: (B, L, H, P) in q.dtype.
    """
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    begins = first.flatten().nonzero()[:, 0].tolist()
    sizes = [end - begin for begin, end in zip(begins, [*begins[1:], first.numel()], strict=True)]
    grouped, parts = q.shape[2] != k.shape[2], []
    for part in zip(*(t.flatten(0, 1).split(sizes) for t in (q, k, v)), strict=True):
        own = (t.transpose(0, 1)[None] for t in part)  # (1, heads, tokens of the document, P)
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=grouped)[0].transpose(0, 1))
    return torch.cat(parts).view(q.shape)


def _past(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every query sees every key that is no padding."""
    B, H, L, P = q.shape
    K = k.shape[1]
    # the query heads of a group become queries of one head, so that no key is ever repeated
    rows = q.reshape(B, K, H // K * L, P)
    bias = None
    if mask is not None:
        bias = _bias(mask[:, None, None], q.dtype).expand(-1, -1, rows.shape[2], -1)
    out, total = _tiled(rows, k, v, attn_mask=bias)
    if mask is not None:
        # over no key at all, the sum is nothing
        total = total.masked_fill(~mask.any(1)[:, None, None], -torch.inf)
    return out.reshape(B, H, L, P), total.reshape(B, H, L)


def _own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention inside the block."""
    R = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    if mask is None:
        return _tiled(q, k, v, is_causal=True)
    n = q.shape[2]
    ones = torch.ones(n, n, dtype=torch.bool, device=q.device)
    # a padding query sees itself, so that no sum is empty
    seen = (mask[:, None] & ones.tril()) | torch.eye(n, dtype=torch.bool, device=q.device)
    return _tiled(q, k, v, attn_mask=_bias(seen[:, None], q.dtype).expand(-1, q.shape[1], -1, -1))


def _tiled(q: Tensor, k: Tensor, v: Tensor, **how: object) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **how)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _merged(a: Tensor, sum_a: Tensor, b: Tensor, sum_b: Tensor) -> Tensor:
    """Two parts of a softmax as one, in the parts' dtype; a's sum is never nothing."""
    share = torch.sigmoid(sum_b - sum_a)[..., None]
    return torch.lerp(a.to(share.dtype), b.to(share.dtype), share).to(a.dtype)
