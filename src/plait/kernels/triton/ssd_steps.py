"""Time steps of the scan from their raw projections, laid out for the kernels that follow, and their gradients.

    dt_t = clamp(softplus(raw_t + bias), low, high)      0 at padding, and behind the last token
    a_t  = log2(e) A (dt_1 + ... + dt_t)                 from the beginning of the chunk
    d raw_t = (ddt_t + A da_t) softplus'(raw_t + bias)   with da_t the sum of d a_i, i >= t in the chunk
    dA = sum_t dt_t da_t,  d bias = sum_t d raw_t

Shapes   b batch, L time, H heads, Q tokens of a chunk, n chunks; dt, a and their gradients (b, H, n Q).
Numbers  float32. Both kernels read and write each number once: 10 bytes of traffic a token and head.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(t):
    """Softplus and its derivative."""
    e = tl.exp(-tl.abs(t))
    # log(1 + e), exact for small e too: the rounding of 1 + e cancels in the quotient
    more = 1.0 + e
    log = tl.where(more == 1.0, e, tl.log(more) * (e / tl.where(more == 1.0, 1.0, more - 1.0)))
    return tl.maximum(t, 0.0) + log, tl.where(t >= 0.0, 1.0, e) / more


@triton.jit
def _raw_tile(dt, bias, mask, b, i, h, dt_b, dt_l, dt_h, L, H):
    """raw + bias at tokens i and heads h, and where time passes: (Q, heads)."""
    live = (i < L)[:, None] & (h < H)[None, :]
    raw = tl.load(dt + b * dt_b + i[:, None] * dt_l + h[None, :] * dt_h, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    if mask is not None:
        live = live & (tl.load(mask + b * L + i, mask=i < L, other=0) != 0)[:, None]
    return raw, live


@triton.jit
def steps(
    raw, A, bias, starts, mask, low, high, dt, a, begun, dt_b, dt_l, dt_h, L, H, n_padded,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (c, j, b): chunk c, the j-th block of heads. begun (b, n Q) counts a chunk's documents started so far."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    t, live = _raw_tile(raw, bias, mask, b, i, h, dt_b, dt_l, dt_h, L, H)
    step, _ = _softplus(t)
    step = tl.where(live, tl.minimum(tl.maximum(step, low), high), 0.0)
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * LOG2_E
    at = (b * H + h[None, :]) * n_padded + i[:, None]
    tl.store(dt + at, step, mask=(h < H)[None, :])
    tl.store(a + at, tl.cumsum(step * rate[None, :], 0), mask=(h < H)[None, :])
    if starts is not None:
        if tl.program_id(1) == 0:
            new = tl.load(starts + b * L + i, mask=i < L, other=0).to(tl.int32)
            tl.store(begun + b * n_padded + i, tl.cumsum(new, 0))


@triton.jit
def step_gradients(
    raw, A, bias, mask, low, high, d_dt, d_a, d_raw, dA, d_bias, dt_b, dt_l, dt_h, L, H, n_padded,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (c, j, b) as above: d_raw (b, L, H), and the chunk's share of dA and d_bias (b, n, H)."""
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = c * Q + tl.arange(0, Q)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    t, live = _raw_tile(raw, bias, mask, b, i, h, dt_b, dt_l, dt_h, L, H)
    step, slope = _softplus(t)
    slope = tl.where(live & (step >= low) & (step <= high), slope, 0.0)
    step = tl.where(live, tl.minimum(tl.maximum(step, low), high), 0.0)
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    at = (b * H + h[None, :]) * n_padded + i[:, None]
    da = tl.cumsum(tl.load(d_a + at, mask=(h < H)[None, :], other=0.0), 0, reverse=True)
    ddt = tl.load(d_dt + at, mask=(h < H)[None, :], other=0.0)
    out = (ddt + rate[None, :] * da) * slope
    inside = (i < L)[:, None] & (h < H)[None, :]
    tl.store(d_raw + (b * L + i[:, None]) * H + h[None, :], out.to(d_raw.dtype.element_ty), mask=inside)
    share = (b * tl.num_programs(0) + c) * H + h
    tl.store(dA + share, tl.sum(step * da, 0), mask=h < H)
    tl.store(d_bias + share, tl.sum(out, 0), mask=h < H)
