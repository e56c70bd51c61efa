"""Sampling on a GPU without sorting: one program per row finds the edge of what is kept, then walks to its number.

Top-k and top-p are the same question: the largest logit u with weight(x >= u) >= target, where a token weighs 1 and the
target is k, or weighs exp(x - max) and the target is p of all. An interval around u is halved, each time with one walk
over the row, which the cache holds; its ends jump to logits that exist, so that a dozen walks or so are enough.
"""

# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["sample"] = {"BLOCK": 16384, "num_warps": 16}


@triton.jit
def _scaled(x_ptr, first, V, t, BLOCK: tl.constexpr):
    cols = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    return x / t, cols


@triton.jit
def _edge(x_ptr, V, t, largest, low, high, floor, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    # low: weight(x >= low) >= target; high: weight(x >= high) < target; only x >= floor count
    going = True
    while going:
        middle = 0.5 * low + 0.5 * high
        going = (middle > low) & (middle < high)
        if going:
            weight = 0.0
            above = float("inf")
            below = float("-inf")
            for first in range(0, V, BLOCK):
                x, _ = _scaled(x_ptr, first, V, t, BLOCK)
                x = tl.where(x >= floor, x, float("-inf"))
                over = x >= middle
                if BY_MASS:
                    one = tl.exp(x - largest)
                else:
                    one = tl.where(over, 1.0, 0.0)
                weight += tl.sum(tl.where(over, one, 0.0), 0)
                above = tl.minimum(above, tl.min(tl.where(over, x, float("inf")), 0))
                below = tl.maximum(below, tl.max(tl.where(over, float("-inf"), x), 0))
            if weight >= target:
                low = above
                if not BY_MASS:
                    # just as many as wanted
                    going = weight > target
            else:
                high = middle
                going = below > low
    return low


@triton.jit
def _mass(x_ptr, V, t, largest, floor, BLOCK: tl.constexpr):
    # sum of exp(x - largest) over x >= floor, how many, and the same of x == floor
    total = 0.0
    count = 0.0
    for first in range(0, V, BLOCK):
        x, _ = _scaled(x_ptr, first, V, t, BLOCK)
        kept = x >= floor
        total += tl.sum(tl.where(kept, tl.exp(x - largest), 0.0), 0)
        count += tl.sum(tl.where(kept, 1.0, 0.0), 0)
    return total, count


@triton.jit
def _sample_kernel(
    logits_ptr, uniform_ptr, t_ptr, k_ptr, p_ptr, m_ptr, ids_ptr, floor_ptr, stride, V, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr = logits_ptr + row * stride
    t = tl.load(t_ptr + row)
    greedy = t == 0.0
    t = tl.where(greedy, 1.0, t)

    largest = float("-inf")
    smallest = float("inf")
    best = 0
    broken = 0
    n_finite = 0.0
    for first in range(0, V, BLOCK):
        x, cols = _scaled(x_ptr, first, V, t, BLOCK)
        broken += tl.sum((x != x).to(tl.int32), 0)
        x = tl.where(x != x, float("-inf"), x)
        finite = x > float("-inf")
        n_finite += tl.sum(tl.where(finite, 1.0, 0.0), 0)
        smallest = tl.minimum(smallest, tl.min(tl.where(finite, x, float("inf")), 0))
        top = tl.max(x, 0)
        at = tl.min(tl.where(x == top, cols, V), 0)
        best = tl.where(top > largest, at, best)
        largest = tl.maximum(largest, top)

    floor = float("-inf")
    chosen = best
    # no distribution over logits that are infinite, or all of them minus infinity
    endless = (largest == float("inf")) | (largest == float("-inf"))
    if (broken == 0) & (endless == 0) & (greedy == 0):
        k = tl.load(k_ptr + row).to(tl.float32)
        p = tl.load(p_ptr + row)
        m = tl.load(m_ptr + row)
        # a little above the largest: nothing weighs there
        high = largest + tl.abs(largest) * 1e-6 + 1e-30
        limited = (k >= 1.0) & (k < n_finite)
        if limited:
            floor = _edge(x_ptr, V, t, largest, smallest, high, float("-inf"), k, False, BLOCK)
        if p < 1.0:
            total, count = _mass(x_ptr, V, t, largest, floor, BLOCK)
            if limited:
                # equal logits at the edge stay together, but only k tokens count for the mass
                total -= (count - k) * tl.exp(floor - largest)
            # what lies 40 below the largest weighs nothing, for any vocabulary
            low = tl.maximum(tl.maximum(floor, smallest), largest - 40.0)
            floor = _edge(x_ptr, V, t, largest, low, high, low, p * total, True, BLOCK)
        if m > 0.0:
            floor = tl.maximum(floor, largest + tl.log(m))

        total64 = tl.zeros([], tl.float64)
        for first in range(0, V, BLOCK):
            x, _ = _scaled(x_ptr, first, V, t, BLOCK)
            total64 += tl.sum(tl.where(x >= floor, tl.exp(x - largest), 0.0), 0).to(tl.float64)
        goal = tl.load(uniform_ptr + row).to(tl.float64) * total64
        passed = tl.zeros([], tl.float64)
        chosen = V
        first = 0
        while (first < V) & (chosen == V):
            x, cols = _scaled(x_ptr, first, V, t, BLOCK)
            kept = (x >= floor) & (x > float("-inf"))
            weight = tl.where(kept, tl.exp(x - largest), 0.0)
            sums = passed + tl.cumsum(weight, 0).to(tl.float64)
            chosen = tl.min(tl.where(kept & (sums > goal), cols, V), 0)
            passed += tl.sum(weight, 0).to(tl.float64)
            first += BLOCK
        # sums in another order may miss the goal by a rounding: then it is the likeliest
        chosen = tl.where(chosen == V, best, chosen)
    ok = (broken == 0) & ((endless == 0) | greedy)
    tl.store(ids_ptr + row, tl.where(ok, chosen, -1).to(tl.int64))
    tl.store(floor_ptr + row, floor)


def sample_ids(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """See plait.ops.sample.sample_ids; also returns (B,) float32, the least logit over the temperature that is kept."""
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    floor = torch.empty(B, dtype=torch.float32, device=logits.device)
    settings = (t.contiguous() for t in (uniform, temperature, top_k, top_p, min_p))
    how = config("sample", V=V)
    _sample_kernel[(B,)](logits, *settings, ids, floor, logits.stride(0), V, **how)
    return ids, floor
