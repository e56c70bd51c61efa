"""Attention of one new token per sequence over a long cache of keys and values, contiguous or in pages.

    out_b = sum_s softmax_s( q_b . k_s / sqrt(P) ) v_s      starts_b <= s < lengths_b

Query head h reads key/value head h // (H / K). How far each sequence reaches is told by tensors on the device, so that
a step can be captured once and replayed as sequences grow. A sequence without keys gives zeros.

Shapes   B sequences, S room for keys, H query heads, K key/value heads, P head size, M pages per sequence.
Numbers  products and softmax in float32 (float64 for float64), result in q.dtype.
Source   Dao et al. 2023, "Flash-Decoding" (split over the keys, combined by their log-sum-exp); Kwon et al. 2023,
         arXiv:2309.06180 (pages).
"""

import torch
from torch import Tensor

from plait.ops.dispatch import Op, triton_serves


@Op
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Attend from one token of each sequence to its cached tokens, its own included.

    Args:
        q: (B, H, P).
        k_cache, v_cache: (B, K, S, P), or with a page table (pages, K, tokens per page, P).
        lengths: (B,) int32 or int64: one past the last key of each sequence.
        starts: (B,) of the same kind: the first key, where padding comes before; None is 0.
        page_table: (B, M) int32: page m of a sequence holds its keys m * tokens per page and on. Entries beyond a
            sequence's length are never used.

    Returns: (B, H, P) in q.dtype.
    Raises: ValueError if K does not divide H, or the batches differ.
    """
    _check(q, k_cache, lengths, page_table)
    (B, H, P), K = q.shape, k_cache.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (t if page_table is None else _gathered(t, page_table) for t in (k_cache, v_cache))
    columns = torch.arange(k.shape[2], device=q.device)
    seen = columns < lengths[:, None]  # (B, S)
    if starts is not None:
        seen = seen & (columns >= starts[:, None])
    seen = seen[:, None, None]
    scores = torch.einsum("bkgp,bksp->bkgs", q.view(B, K, H // K, P).to(wide), k.to(wide)) * P**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    # what lies beyond a sequence's end may be anything, even no number
    v = v.to(wide).masked_fill(~seen.transpose(-1, -2), 0.0)
    return (weights @ v).reshape(B, H, P).to(q.dtype)


def _on_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
) -> bool:
    grad = torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad)
    return not grad and q.dtype != torch.float64 and triton_serves(q, k_cache, v_cache, lengths, starts, page_table)


@decode_attention.backend("triton", when=_on_triton)
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    from plait.kernels.triton.decode_attention import decode_attention as kernel

    _check(q, k_cache, lengths, page_table)
    return kernel(q, k_cache, v_cache, lengths, starts, page_table)


def _gathered(pages: Tensor, table: Tensor) -> Tensor:
    """(pages, K, page, P) to (B, K, M * page, P)."""
    used = pages[table.long().clamp(0, pages.shape[0] - 1)]  # (B, M, K, page, P)
    return used.transpose(1, 2).flatten(2, 3)


def _check(q: Tensor, k_cache: Tensor, lengths: Tensor, page_table: Tensor | None) -> None:
    (B, H), K = q.shape[:2], k_cache.shape[1]
    if H % K:
        raise ValueError(f"{K} key/value heads do not divide {H} query heads")
    held = k_cache.shape[0] if page_table is None else page_table.shape[0]
    if held != B or lengths.shape != (B,):
        raise ValueError(f"{B} queries, a cache of {held} sequences, lengths {tuple(lengths.shape)}: they must agree")
