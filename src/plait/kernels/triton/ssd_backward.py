"""The Mamba-2 scan backwards: every gradient of a chunk, from the state before it and that state's gradient after it.

With S before the chunk, dS after it, T_j = dS B_j, U_i = S C_i, and W, a, from_begin, to_end, keep as in ssd_chunk.py:

    d(dt x)_j = sum_i W_ij dy_i + to_end_j T_j           dx_j = dt_j d(dt x)_j + D dy_j
    dC_i      = sum_heads sum_j Z_ij B_j + from_begin_i S^T dy_i           Z_ij = 2^(a_i - a_j) dt_j (dy_i . x_j)
    dB_j      = sum_heads sum_i Z_ij C_i + to_end_j dt_j dS^T x_j
    da_t      = what passes over t: sum_(i >= t > j) Z_ij (C_i . B_j) + sum_(i >= t) from_begin_i dy_i . U_i
                                    + sum_(j < t) to_end_j dt_j x_j . T_j + keep <dS, S>
    ddt_t     = x_t . d(dt x)_t + A da_t                 dA = sum_t dt_t da_t

A program takes one chunk and heads of one group, one after the other, so C B^T is formed once and dB and dC add up in
registers. The first term of da is the running sum of row sums less column sums of one matrix, which cancel exactly.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, n chunks of Q tokens, `parts` programs a group.
Numbers  sums in float32; dA, dD and d dt_bias of each chunk apart, added up outside.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6; the gradients are derived from its equations.
"""

import triton
import triton.language as tl

from plait.kernels.triton.ssd_chunk import (
    LOG2_E, between, decays, discretize, load_steps, load_tile, product, store_tile,
)  # fmt: skip


@triton.jit
def gradients(
    x, B, C, dt, A, D, bias, starts, mask, low, high,
    dy, states, state_gradients,
    dx, ddt, dB, dC, per_chunk,
    x_b, x_l, x_h, x_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n, dt_b, dt_l, dt_h, dy_b, dy_l, dy_h, dy_p,
    L, H, G, heads_per_group, heads_per_part,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (c, part G + g, b): chunk c, the part-th share of group g's heads.

    dx (b, L, H, P), ddt (b, L, H), dB and dC (parts, b, L, G, N), per_chunk (3, b, n, H): dA, dD, d dt_bias.
    """
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, part = (tl.program_id(1) % G).to(tl.int64), tl.program_id(1) // G
    t, n_rows = c * Q, L - c * Q
    x += b * x_b + t * x_l
    dy += b * dy_b + t * dy_l
    dt += b * dt_b
    if starts is not None:
        starts += b * L
    if mask is not None:
        mask += b * L
    B_tile = load_tile(B + b * B_b + t * B_l + g * B_g, B_l, B_n, n_rows, N, Q, NB).to(x.dtype.element_ty)
    C_tile = load_tile(C + b * C_b + t * C_l + g * C_g, C_l, C_n, n_rows, N, Q, NB).to(x.dtype.element_ty)
    scores = product(C_tile, tl.trans(B_tile), None, PRECISION)
    Z_sum = tl.zeros((Q, Q), tl.float32)
    dB_sum, dC_sum = tl.zeros((Q, NB), tl.float32), tl.zeros((Q, NB), tl.float32)
    n_heads = tl.minimum(heads_per_part, heads_per_group - part * heads_per_part)
    for k in range(n_heads):
        h = g * heads_per_group + part * heads_per_part + k
        x_tile = load_tile(x + h * x_h, x_l, x_p, n_rows, P, Q, PB)
        dy_tile = load_tile(dy + h * dy_h, dy_l, dy_p, n_rows, P, Q, PB).to(x_tile.dtype)
        at = (b * tl.num_programs(0) + c) * H + h
        S = load_tile(states + at * (P * N), N, 1, P, N, PB, NB)
        dS = load_tile(state_gradients + at * (P * N), N, 1, P, N, PB, NB)
        rate = tl.load(A + h).to(tl.float32)
        offset, skip = 0.0, 0.0
        if bias is not None:
            offset = tl.load(bias + h).to(tl.float32)
        if D is not None:
            skip = tl.load(D + h).to(tl.float32)
        raw, new, live = load_steps(dt + h * dt_h, dt_l, starts, mask, t, L, Q)
        step, slope = discretize(raw, live, offset, low, high)
        a, begun, from_begin, to_end, keep = decays(step * (rate * LOG2_E), new, starts is not None)
        x_f, dy_f = x_tile.to(tl.float32), dy_tile.to(tl.float32)

        decay = between(a, begun, Q, starts is not None)
        W = (scores * decay).to(x_tile.dtype)
        Z = product(dy_tile, tl.trans(x_tile), None, PRECISION) * decay * step[None, :]
        Z_sum += Z
        Z *= scores
        passing = tl.sum(Z, 1) - tl.sum(Z, 0)

        U = product(C_tile, tl.trans(S), None, PRECISION)
        passing += from_begin * tl.sum(U * dy_f, 1)
        dC_sum = product((dy_f * from_begin[:, None]).to(x_tile.dtype), S, dC_sum, PRECISION)

        d_in = product(B_tile, tl.trans(dS), None, PRECISION) * to_end[:, None]
        ending = step * tl.sum(d_in * x_f, 1)
        dB_sum = product((x_f * (to_end * step)[:, None]).to(x_tile.dtype), dS, dB_sum, PRECISION)
        d_in = product(tl.trans(W), dy_tile, d_in, PRECISION)
        store_tile(dx + ((b * L + t) * H + h) * P, d_in * step[:, None] + skip * dy_f, H * P, n_rows, P, Q, PB)

        through = keep * tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        da = tl.cumsum(passing - ending, reverse=True) + tl.sum(ending) + through
        d_raw = (tl.sum(d_in * x_f, 1) + rate * da) * slope
        i = tl.arange(0, Q)
        tl.store(ddt + (b * L + t + i) * H + h, d_raw.to(ddt.dtype.element_ty), mask=i < n_rows)
        stride = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * H
        tl.store(per_chunk + at, tl.sum(step * da))
        tl.store(per_chunk + stride + at, tl.sum(x_f * dy_f))
        tl.store(per_chunk + 2 * stride + at, tl.sum(d_raw))
    Z_low = Z_sum.to(B_tile.dtype)
    dC_sum = product(Z_low, B_tile, dC_sum, PRECISION)
    dB_sum = product(tl.trans(Z_low), C_tile, dB_sum, PRECISION)
    at = (((part * tl.num_programs(2) + b) * L + t) * G + g) * N
    store_tile(dB + at, dB_sum, G * N, n_rows, N, Q, NB)
    store_tile(dC + at, dC_sum, G * N, n_rows, N, Q, NB)
