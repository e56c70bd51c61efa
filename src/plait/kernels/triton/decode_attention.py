"""Attention of one token over a long cache on a GPU: many programs share the keys of a head, then combine.

The cache is read once, at memory speed: one program takes one slice of one key/value head's keys for all query heads
of its group (padded to the 16 rows that a matrix unit takes). Each slice keeps a running maximum m, sum l and weighted
sum of values; the slices are merged by

    out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i,   m = max_i m_i

How many slices there are depends on the GPU and the batch only, never on the lengths, which stay on the device: the
launch can be captured in a graph. Slices past a sequence's end return at once.
"""

# pyright: reportOperatorIssue=false, reportCallIssue=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

# two programs of 64 keys and three stages fit the shared memory of one multiprocessor
DEFAULTS["decode_attention"] = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
# slices of one head never become more than this: the merge reads them all at once
MOST_SPLITS = 128
LOG2E = 1.4426950408889634


@triton.jit
def _put(
    acc,
    m,
    total,
    row,
    cols,
    split,
    splits,
    acc_ptr,
    ml_ptr,
    out_ptr,
    mask,
    in_group,
    P: tl.constexpr,
    DIRECT: tl.constexpr,
):
    if DIRECT:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + row[:, None] * P + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = row * splits + split
        tl.store(acc_ptr + part[:, None] * P + cols[None, :], acc, mask=mask)
        tl.store(ml_ptr + part * 2, m, mask=in_group)
        tl.store(ml_ptr + part * 2 + 1, total, mask=in_group)


@triton.jit
def _slice_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    starts_ptr,
    table_ptr,
    acc_ptr,
    ml_ptr,
    out_ptr,
    scale,
    q_b,
    q_h,
    kv_b,
    kv_h,
    kv_s,
    table_b,
    page,
    K,
    splits,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PAGED: tl.constexpr,
    DIRECT: tl.constexpr,
    DOT: tl.constexpr,
):
    # one program: slice `split` of the keys of head k of sequence b
    bk = tl.program_id(0)
    split = tl.program_id(1)
    b = (bk // K).to(tl.int64)
    head = (bk % K).to(tl.int64)
    end = tl.load(lengths_ptr + b).to(tl.int32)
    begin = tl.load(starts_ptr + b).to(tl.int32) if HAS_STARTS else end * 0
    # slices of whole blocks, as equal as they can be
    per = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    first = begin + split * per
    last = tl.minimum(first + per, end)

    m_rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_P)
    keys = tl.arange(0, BLOCK_N)
    in_group = m_rows < GROUP
    in_head = cols < P
    heads = head * GROUP + m_rows
    q_mask = in_group[:, None] & in_head[None, :]
    q = tl.load(q_ptr + b * q_b + heads[:, None] * q_h + cols[None, :], mask=q_mask, other=0.0).to(DOT)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for n in range(first, last, BLOCK_N):
        at = n + keys
        there = at < last
        if PAGED:
            held = tl.load(table_ptr + b * table_b + at // page, mask=there, other=0).to(tl.int64)
            rows = at % page
        else:
            held = b
            rows = at
        kv = held * kv_b + head * kv_h + rows.to(tl.int64) * kv_s
        kv_mask = there[:, None] & in_head[None, :]
        k = tl.load(k_ptr + kv[:, None] + cols[None, :], mask=kv_mask, other=0.0).to(DOT)
        v = tl.load(v_ptr + kv[:, None] + cols[None, :], mask=kv_mask, other=0.0).to(DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # in powers of two
        s = tl.where(there[None, :], s, float("-inf"))
        # a block of the loop holds at least one key: its maximum is a number
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])
        keep = tl.exp2(m - new_m)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = new_m

    row = (b * K + head) * GROUP + m_rows  # of B x H
    _put(acc, m, total, row, cols, split, splits, acc_ptr, ml_ptr, out_ptr, q_mask, in_group, P, DIRECT)


@triton.jit
def _merge_kernel(acc_ptr, ml_ptr, out_ptr, splits, P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    # one program: one query head of one sequence
    row = tl.program_id(0).to(tl.int64)
    slices = tl.arange(0, BLOCK_S)
    cols = tl.arange(0, BLOCK_P)
    part = row * splits + slices
    m = tl.load(ml_ptr + part * 2, mask=slices < splits, other=float("-inf"))
    used = m > float("-inf")
    sums = tl.load(ml_ptr + part * 2 + 1, mask=used, other=0.0)
    largest = tl.max(m, 0)
    weight = tl.where(used, tl.exp2(m - tl.where(largest > float("-inf"), largest, 0.0)), 0.0)
    total = tl.sum(weight * sums, 0)
    mask = used[:, None] & (cols < P)[None, :]
    acc = tl.load(acc_ptr + part[:, None] * P + cols[None, :], mask=mask, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * P + cols, out.to(out_ptr.dtype.element_ty), mask=cols < P)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor | None, page_table: Tensor | None
) -> Tensor:
    """See plait.ops.decode_attention; inputs are checked there."""
    (B, H, P), K = q.shape, k_cache.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    if k_cache.stride(3) != 1 or k_cache.stride() != v_cache.stride():
        raise ValueError("k_cache and v_cache must lie in memory alike, and contiguous in their last dimension")
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    room = k_cache.shape[2] if page_table is None else k_cache.shape[2] * page_table.shape[1]
    how = config("decode_attention", P=P)
    splits = _splits(B * K, room, how["BLOCK_N"], _multiprocessors(q.device))
    out = q.new_empty(B, H, P)
    direct = splits == 1
    acc = out if direct else torch.empty(B * H, splits, P, dtype=torch.float32, device=q.device)
    ml = out if direct else torch.empty(B * H, splits, 2, dtype=torch.float32, device=q.device)
    block_p = max(16, triton.next_power_of_2(P))
    _slice_kernel[(B * K, splits)](
        *(q, k_cache, v_cache, lengths, starts, page_table, acc, ml, out),
        P**-0.5 * LOG2E,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        0 if page_table is None else page_table.stride(0),
        k_cache.shape[2],
        K,
        splits,
        GROUP=H // K,
        P=P,
        BLOCK_M=max(16, triton.next_power_of_2(H // K)),
        BLOCK_P=block_p,
        HAS_STARTS=starts is not None,
        PAGED=page_table is not None,
        DIRECT=direct,
        # the interpreter's product of bfloat16 is wrong; everywhere else the matrix units take the halves as they are
        DOT=getattr(tl, str(q.dtype if q.is_cuda else torch.float32)[6:]),
        **how,
    )
    if not direct:
        block_s = triton.next_power_of_2(splits)
        _merge_kernel[(B * H,)](acc, ml, out, splits, P=P, BLOCK_S=block_s, BLOCK_P=block_p, num_warps=4)
    return out


def _splits(heads: int, room: int, block: int, multiprocessors: int) -> int:
    """Slices per head: the fewest whose programs, two to a multiprocessor, leave no more than a twentieth idle."""
    at_once, best = 2 * multiprocessors, (0.0, 1)
    # no slice below four blocks
    for splits in range(1, max(1, min(room // (4 * block), MOST_SPLITS)) + 1):
        programs = heads * splits
        busy = programs / (-(-programs // at_once) * at_once)
        if busy >= 0.95:
            return splits
        best = max(best, (busy, splits), key=lambda found: found[0])
    return best[1]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # without a GPU: enough for several slices
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
