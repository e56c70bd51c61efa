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

from plait.ops.dispatch import Op, native_serves

# masks are built for so many queries at a time that a row of the batch needs this many numbers, whatever S is
MASK_NUMBERS = 1 << 23


@Op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    """Attend from the last L tokens to all S tokens before and including each.

    Args:
        q: (B, L, H, P).
        k, v: (B, S, K, P), S >= L.
        key_mask: (B, S) bool, False at keys that are padding; what a padding query gives means nothing.
        documents: (B, S) int64 document index of every token, rising along a row; attention stays inside a document.
        cuts: `document_cuts` of these documents and key_mask; only saves waiting for a GPU in every layer.

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
    if q.is_cuda and key_mask is None and documents is None and q.dtype in (torch.float16, torch.bfloat16):
        # half of a second and 150 MB, which only a GPU has a use for
        from torch.nn.attention.bias import causal_lower_right

        # the GPU's tiled kernels align the causal mask with the last key and never form it
        aligned = causal_lower_right(L, S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=aligned, enable_gqa=grouped).transpose(1, 2)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        # a loop over blocks would be unrolled, anew for every length
        mask = _visible(S - L, S, q.device, key_mask, documents)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
    blocks, step = [], max(1, MASK_NUMBERS // S)
    for first in range(0, L, step):
        last = min(first + step, L)
        end = S - L + last  # later keys are invisible to this block
        mask = _visible(S - L + first, end, q.device, key_mask, documents)
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=grouped
            )
        )
    return torch.cat(blocks, 2).transpose(1, 2)


def _is_one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> bool:
    """Whether one query per sequence meets keys that lie as a cache keeps them, (B, K, room, P)."""
    if q.shape[1] != 1 or documents is not None or torch.is_grad_enabled() or q.shape[2] % k.shape[2]:
        return False
    B, S, K, P = k.shape
    if v.shape != k.shape or q.shape[::3] != (B, P) or (key_mask is not None and key_mask.shape != (B, S)):
        return False
    lies = all(
        t.stride(3) == 1 and t.stride(1) == P and t.stride(2) % P == 0 and t.stride(0) == K * t.stride(2)
        for t in (k, v)
    )
    return lies and k.dtype == v.dtype and q.numel() > 0 and native_serves("decode", q, k, v)


@attention.backend("native", when=_is_one_token)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    from plait.kernels.native.decode import attend

    return attend(q, k, v, key_mask)


def _without_masks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> bool:
    """Whether this is a piece of a longer or padded sequence that needs no gradient."""
    needs = key_mask is not None or k.shape[1] > q.shape[1] > 1
    if not (needs and q.is_cpu and documents is None and q.shape[2] % k.shape[2] == 0 and k.shape[1] >= q.shape[1] > 1):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    from plait.kernels.eager.attention import available

    return available()


@attention.backend("eager", when=_without_masks)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    from plait.kernels.eager.attention import attend

    return attend(q, k, v, key_mask)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> bool:
    """Whether these are packed rows whose documents may be looked at: a GPU would wait, a compiler cannot know them."""
    fits = q.shape[1] == k.shape[1] and q.shape[2] % k.shape[2] == 0 and q.numel() > 0
    return fits and documents is not None and key_mask is None and q.is_cpu and not torch.compiler.is_compiling()


@attention.backend("documents", when=_packed)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    from plait.kernels.eager.attention import by_documents

    assert documents is not None
    return by_documents(q, k, v, documents)


def _on_gpu_of_any_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> bool:
    """Whether these are padded or packed rows that FlashAttention takes without padding, on a GPU."""
    (L, H), (S, K) = q.shape[1:3], k.shape[1:3]
    if (key_mask is None and documents is None) or q.numel() == 0 or H % K or S < L or L == 1:
        return False
    if documents is not None and S != L:
        return False
    # what the device must be asked for, no compiler can wait for
    if torch.compiler.is_compiling() and (cuts is None or key_mask is not None):
        return False
    return _trusts(q, k, v)


def _trusts(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.is_cuda:
        return False
    from plait.kernels.eager.varlen import fits, trusted

    return fits(q, k, v) and trusted(q.device.index)


@attention.backend("varlen", when=_on_gpu_of_any_length)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    from plait.kernels.eager import varlen

    if documents is not None and cuts is None:
        cuts = varlen.document_cuts(documents, key_mask)
    return varlen.attend(q, k, v, key_mask, cuts if documents is not None else None)


def document_cuts(documents: Tensor, key_mask: Tensor | None = None) -> Tensor | None:
    """What `attention` takes as `cuts`, where it would use it: on a GPU, whose work is waited for once; else None."""
    if not documents.is_cuda:
        return None
    from plait.kernels.eager.varlen import document_cuts as cuts

    return cuts(documents, key_mask)


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
