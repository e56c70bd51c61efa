"""The Mamba-2 scan backwards: every gradient of a chunk, from the state before it and that state's gradient after it.

With S before the chunk, dS after it, T_j = dS B_j, U_i = S C_i, and a, from_begin, to_end, keep as in ssd_chunk.py:

    Z_ij      = 2^(a_i - a_j) dt_j (dy_i . x_j)           M_ij = Z_ij (C_i . B_j)          j visible from i
    d(dt x)_j = sum_i 2^(a_i - a_j) (C_i . B_j) dy_i + to_end_j T_j           dx_j = dt_j d(dt x)_j + D dy_j
    dC_i      = sum_heads sum_j Z_ij B_j + from_begin_i S^T dy_i
    dB_j      = sum_heads sum_i Z_ij C_i + to_end_j dt_j dS^T x_j
    ddt_j     = x_j . d(dt x)_j
    da_i      = sum_k M_ik - sum_k M_ki + from_begin_i dy_i . U_i - to_end_i dt_i x_i . T_i,     and at the chunk's end
                + keep <dS, S> + sum_j to_end_j dt_j x_j . T_j

A program takes one chunk and heads of one group, one after the other, so C B^T is formed once and dB and dC add up in
registers. Row and column sums of M come from one matrix, so that they cancel exactly where a has no influence.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, n chunks of Q tokens, `parts` programs a group.
Numbers  sums in float32.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6; the gradients are derived from its equations.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from plait.kernels.triton.ssd_chunk import between, decays, load_tile, product, store_tile


@triton.jit
def gradients(
    x, B, C, D, dt, a, begun, dy, states, state_gradients, dx, d_dt, d_a, dB, dC, dD,
    x_b, x_l, x_h, x_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n, dy_b, dy_l, dy_h, dy_p,
    L, H, G, heads_per_group, heads_per_part, n_padded,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (c, part G + g, b): chunk c, the part-th share of group g's heads.

    dx (b, L, H, P), d_dt and d_a (b, H, n Q), dB and dC (parts, b, L, G, N), dD (b, n, H).
    """
    c, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, part = (tl.program_id(1) % G).to(tl.int64), tl.program_id(1) // G
    t, n_rows = c * Q, L - c * Q
    i = tl.arange(0, Q)
    x += b * x_b + t * x_l
    dy += b * dy_b + t * dy_l
    if begun is not None:
        begun += b * n_padded
    B_tile = load_tile(B + b * B_b + t * B_l + g * B_g, B_l, B_n, n_rows, N, Q, NB).to(x.dtype.element_ty)
    C_tile = load_tile(C + b * C_b + t * C_l + g * C_g, C_l, C_n, n_rows, N, Q, NB).to(x.dtype.element_ty)
    scores = product(C_tile, tl.trans(B_tile), None, PRECISION).to(B_tile.dtype)
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
        row = (b * H + h) * n_padded
        step, log, count, from_begin, to_end, keep = decays(dt + row, a + row, begun, t, Q)
        x_f, dy_f = x_tile.to(tl.float32), dy_tile.to(tl.float32)
        at_end = keep * tl.sum(S.to(tl.float32) * dS.to(tl.float32))

        dC_sum = product((dy_f * from_begin[:, None]).to(x_tile.dtype), S, dC_sum, PRECISION)
        dB_sum = product((x_f * (to_end * step)[:, None]).to(x_tile.dtype), dS, dB_sum, PRECISION)
        U = product(C_tile, tl.trans(S), None, PRECISION)
        da = from_begin * tl.sum(U * dy_f, 1)

        Z = product(dy_tile, tl.trans(x_tile), None, PRECISION)
        if D is not None:
            tl.store(dD + at, tl.sum(tl.where(i[:, None] == i[None, :], Z, 0.0)))
        decay = between(log, count, Q, begun is not None)
        W = (scores * decay).to(x_tile.dtype)
        Z *= decay * step[None, :]
        Z_sum += Z
        # the diagonal passes over no token; left out, it cannot drown the small terms beside it
        Z = tl.where(i[:, None] == i[None, :], 0.0, Z * scores)
        da += tl.sum(Z, 1) - tl.sum(Z, 0)

        inner = product(tl.trans(W), dy_tile, None, PRECISION)
        # not added up in one product: Triton would lay the first out for the second and compute it twice
        T = product(B_tile, tl.trans(dS), None, PRECISION) * to_end[:, None]
        from_end = tl.sum(T * x_f, 1)
        at_end += tl.sum(step * from_end)
        out = inner * step[:, None] + T * step[:, None]
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * dy_f
        store_tile(dx + ((b * L + t) * H + h) * P, out, H * P, n_rows, P, Q, PB)
        tl.store(d_dt + row + t + i, tl.sum(inner * x_f, 1) + from_end)
        tl.store(d_a + row + t + i, da - step * from_end + tl.where(i == Q - 1, at_end, 0.0))
    Z_low = Z_sum.to(B_tile.dtype)
    dC_sum = product(Z_low, B_tile, dC_sum, PRECISION)
    dB_sum = product(tl.trans(Z_low), C_tile, dB_sum, PRECISION)
    to = (((part * tl.num_programs(2) + b) * L + t) * G + g) * N
    store_tile(dB + to, dB_sum, G * N, n_rows, N, Q, NB)
    store_tile(dC + to, dC_sum, G * N, n_rows, N, Q, NB)
