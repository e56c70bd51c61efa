"""Attention of padded and packed rows on GPUs without masks: real tokens back to back, and where each sequence begins.

    rows with padding        x x a b c | x d e f g        ->  a b c d e f g     cuts 0 3 7
    rows of documents        a a b b b | c c c c c        ->  the same tokens   cuts 0 2 5 10

PyTorch's varlen_attn (its FlashAttention) sees only inside each sequence; where there are fewer queries than keys they
are the last ones. What has been cut out, padding, gets zeros. This file is the arithmetic around that one function,
which is tried once on each GPU against plain attention, forward and backward, before it is trusted.

Shapes   B rows, L queries, S keys, T tokens of all of them, n sequences, H query heads, K key/value heads, P size.
Numbers  float16 or bfloat16, as FlashAttention wants.
Source   torch.nn.attention.varlen; Dao 2023, arXiv:2307.08691.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention takes such tensors, wherever they are."""
    return q.dtype in DTYPES and q.dtype == k.dtype == v.dtype and q.shape[3] % 8 == 0 and q.shape[3] <= 256


@torch.compiler.assume_constant_result
def trusted(index: int | None) -> bool:
    """Whether this PyTorch's function for sequences of any length is right on this GPU."""
    return _tried(index)


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cuts: Tensor | None) -> Tensor:
    """Causal attention inside each row or document; differentiable.

    Args:
        q: (B, L, H, P).
        k, v: (B, S, K, P), S >= L; S = L where there are cuts.
        key_mask: (B, S) bool, False at padding.
        cuts: (n + 1,) int32 from `document_cuts`, of the same key_mask.

    Returns: (B, L, H, P); zeros at padding.
    """
    L, S = q.shape[1], k.shape[1]
    q_rows, k_rows, v_rows = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if key_mask is None:
        assert cuts is not None
        return varlen(q_rows, k_rows, v_rows, cuts, cuts, L, S).view(q.shape)
    queries = key_mask[:, S - L :]
    k_at = key_mask.flatten().nonzero()[:, 0]
    q_at = k_at if L == S else queries.flatten().nonzero()[:, 0]
    if q_at.numel() == 0:
        return torch.zeros_like(q)
    k_cuts = row_cuts(key_mask) if cuts is None else cuts
    q_cuts = row_cuts(queries) if cuts is None else cuts
    parts = (q_rows.index_select(0, q_at), k_rows.index_select(0, k_at), v_rows.index_select(0, k_at))
    out = varlen(*parts, q_cuts, k_cuts, L, S)
    return torch.zeros_like(q_rows).index_copy(0, q_at, out).view(q.shape)


def row_cuts(mask: Tensor) -> Tensor:
    """(B + 1,) int32: where each row's real tokens begin among all real tokens; ends with their number."""
    return F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def document_cuts(documents: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Where documents begin among all real tokens, rows one after the other; the device is waited for.

    Args:
        documents: (B, L) index of each token's document, rising along a row.
        key_mask: (B, L) bool, False at padding.

    Returns: (n + 1,) int32 that end with the number of tokens, several times so that n + 1 is a power of two: sequences
        without tokens cost nothing, and a compiler meets few sizes.
    """
    B, L = documents.shape
    # of no two rows the same
    row = torch.arange(B, device=documents.device)[:, None].expand(B, L)
    names = torch.stack([row, documents], -1).flatten(0, 1)
    if key_mask is not None:
        names = names[key_mask.flatten()]
    first = F.pad((names[1:] != names[:-1]).any(1), (1, 0), value=True)
    begins = first[: len(names)].nonzero()[:, 0]
    size = 1 << len(begins).bit_length()
    return F.pad(begins, (0, size - len(begins)), value=len(names)).to(torch.int32)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, q_cuts: Tensor, k_cuts: Tensor, most_queries: int, most_keys: int
) -> Tensor:
    """Causal attention of n sequences laid back to back: (T, H, P) queries, the last of (T', K, P) keys and values."""
    from torch.nn.attention import varlen as theirs

    names = _parameters()
    how: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        how["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    call = cast(Callable[..., Tensor], theirs.varlen_attn)
    return call(q, k, v, q_cuts, k_cuts, most_queries, most_keys, **how)


@torch.compiler.assume_constant_result
def _parameters() -> frozenset[str]:
    # PyTorch 2.11 and later differ
    from torch.nn.attention import varlen as theirs

    return frozenset(inspect.signature(theirs.varlen_attn).parameters)


@functools.cache
def _tried(index: int | None) -> bool:
    """Compare with plain attention: several sequences, one empty, shared heads, fewer queries than keys, gradients."""
    device = torch.device("cuda", index or 0)
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            errors = [trial(device, L) for L in (37, 70)]
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as problem:
        log.warning("attention of packed and padded rows takes masks: varlen_attn fails here (%s)", problem)
        return False
    if max(errors) > 0.02:
        log.warning("attention of packed and padded rows takes masks: varlen_attn is off by %.2g here", max(errors))
    return max(errors) <= 0.02


def trial(device: torch.device, L: int, S: int = 70, dtype: torch.dtype = torch.bfloat16) -> float:
    """The largest relative error of results and gradients on one small case; documents where L = S."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, L, 4, 64), (3, S, 2, 64), (3, S, 2, 64), (3, L, 4, 64))
    q, k, v, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    mask = torch.arange(S, device=device) >= torch.tensor([[0], [S - 9], [S]], device=device)
    position = torch.arange(S, device=device)
    seen = mask[:, None] & (position <= position[S - L :, None])
    cuts = None
    if L == S:
        documents = (position // 13).expand(3, S)
        cuts = document_cuts(documents, mask)
        seen = seen & (documents[:, :, None] == documents[:, None])
    real = mask[:, S - L :]
    seen = seen | (position == position[S - L :, None])  # no empty row of the softmax
    results = []
    for exact in (False, True):
        leaves = [t.detach().to(torch.float32 if exact else dtype).requires_grad_() for t in (q, k, v)]
        if exact:
            a, b, c = (t.transpose(1, 2) for t in leaves)
            out = F.scaled_dot_product_attention(a, b, c, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)
        else:
            out = attend(leaves[0], leaves[1], leaves[2], mask, cuts)
        out = out * real[..., None, None]
        results.append([out.detach(), *torch.autograd.grad((out.float() * weight.float()).sum(), leaves)])
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
