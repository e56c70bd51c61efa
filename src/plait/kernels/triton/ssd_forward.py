"""The Mamba-2 scan forwards: outputs of a head, chunk by chunk, with its state in registers.

    y_i = sum_j W_ij dt_j x_j + from_begin_i S C_i + D x_i        W_ij = 2^(a_i - a_j) (C_i . B_j), j visible from i
    S  <- keep S + sum_j to_end_j dt_j x_j B_j^T

Neither W nor C B^T nor the states of chunks ever reach memory. See ssd_chunk.py for the letters.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, Q tokens of a chunk.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6.
"""

import triton
import triton.language as tl

from plait.kernels.triton.ssd_chunk import (
    LOG2_E, between, carried, decays, discretize, load_steps, load_tile, product, store_tile,
)  # fmt: skip


@triton.jit
def scan(
    x, B, C, dt, A, D, bias, starts, mask, low, high,
    first, totals, kept, y, last,
    x_b, x_l, x_h, x_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n, dt_b, dt_l, dt_h,
    L, H, heads_per_group, segment, n_segments,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (h, s, b) writes y (b, L, H, P) of the s-th segment, and the last one the state after it."""
    h, s, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = (s * segment).to(tl.int64)
    n_chunks = tl.cdiv(tl.minimum(segment, L - t), Q)
    rate = tl.load(A + h).to(tl.float32) * LOG2_E
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + h).to(tl.float32)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + h).to(tl.float32)
    x += b * x_b + h * x_h
    B += b * B_b + (h // heads_per_group) * B_g
    C += b * C_b + (h // heads_per_group) * C_g
    dt += b * dt_b + h * dt_h
    y += (b * L * H + h) * P
    if starts is not None:
        starts += b * L
    if mask is not None:
        mask += b * L
    S = carried(first, totals, kept, b, h, H, s, n_segments, P, N, PB, NB)
    raw, new, live = load_steps(dt, dt_l, starts, mask, t, L, Q)
    for _ in range(n_chunks):
        x_tile = load_tile(x + t * x_l, x_l, x_p, L - t, P, Q, PB)
        B_tile = load_tile(B + t * B_l, B_l, B_n, L - t, N, Q, NB).to(x_tile.dtype)
        C_tile = load_tile(C + t * C_l, C_l, C_n, L - t, N, Q, NB).to(x_tile.dtype)
        step, _ = discretize(raw, live, offset, low, high)
        a, begun, from_begin, to_end, keep = decays(step * rate, new, starts is not None)
        # the next chunk's time steps travel while this one is computed; they are too small for the compiler to do it
        raw, new, live = load_steps(dt, dt_l, starts, mask, t + Q, L, Q)

        out = product(C_tile, tl.trans(S.to(x_tile.dtype)), None, PRECISION) * from_begin[:, None]
        W = product(C_tile, tl.trans(B_tile), None, PRECISION)
        W *= between(a, begun, Q, starts is not None) * step[None, :]
        out = product(W.to(x_tile.dtype), x_tile, out, PRECISION)
        x_f = x_tile.to(tl.float32)
        if D is not None:
            out += skip * x_f
        store_tile(y + t * (H * P), out, H * P, L - t, P, Q, PB)
        weighted = (x_f * (to_end * step)[:, None]).to(x_tile.dtype)
        S = product(tl.trans(weighted), B_tile, S * keep, PRECISION)
        t += Q
    if s == n_segments - 1:
        store_tile(last + (b * H + h) * (P * N), S, N, P, N, PB, NB)
