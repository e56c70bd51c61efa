"""The Mamba-2 scan forwards: outputs of a head, chunk by chunk, with its state in registers.

    y_i = sum_j W_ij dt_j x_j + from_begin_i S C_i + D x_i        W_ij = 2^(a_i - a_j) (C_i . B_j), j visible from i
    S  <- keep S + sum_j to_end_j dt_j x_j B_j^T

Neither W nor C B^T nor the states of chunks ever reach memory. See ssd_chunk.py for the letters.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, Q tokens of a chunk.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from plait.kernels.triton.ssd_chunk import between, carried, decays, load_tile, product, store_tile


@triton.jit
def scan(
    x, B, C, D, dt, a, begun, first, totals, kept, y, last,
    x_b, x_l, x_h, x_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n,
    L, H, heads_per_group, n_padded, segment, n_segments,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (h, s, b) writes y (b, L, H, P) of the s-th segment, and the last one the state after it."""
    h, s, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = (s * segment).to(tl.int64)
    n_chunks = tl.cdiv(tl.minimum(segment, L - s * segment), Q)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + h).to(tl.float32)
    x += b * x_b + h * x_h
    B += b * B_b + (h // heads_per_group) * B_g
    C += b * C_b + (h // heads_per_group) * C_g
    y += (b * L * H + h) * P
    dt += (b * H + h) * n_padded
    a += (b * H + h) * n_padded
    if begun is not None:
        begun += b * n_padded
    S = carried(first, totals, kept, b, h, H, s, n_segments, P, N, PB, NB)
    for _ in range(n_chunks):
        x_tile = load_tile(x + t * x_l, x_l, x_p, L - t, P, Q, PB)
        B_tile = load_tile(B + t * B_l, B_l, B_n, L - t, N, Q, NB).to(x_tile.dtype)
        C_tile = load_tile(C + t * C_l, C_l, C_n, L - t, N, Q, NB).to(x_tile.dtype)
        step, log, count, from_begin, to_end, keep = decays(dt, a, begun, t, Q)

        W = product(C_tile, tl.trans(B_tile), None, PRECISION)
        W *= between(log, count, Q, begun is not None) * step[None, :]
        out = product(C_tile, tl.trans(S.to(x_tile.dtype)), None, PRECISION) * from_begin[:, None]
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
