"""Walk a head's tokens chunk by chunk with its state in registers, forwards, or backwards for its gradient.

    forwards    S  <- keep S  + sum_j to_end_j dt_j x_j B_j^T      the state after the chunk
    backwards   dS <- keep dS + sum_i from_begin_i dy_i C_i^T      the gradient of the state before the chunk

It is one recurrence with other names, so one kernel does both. A long sequence is cut into segments walked at the same
time: the first launch only adds up what each segment contributes on its own (`totals`, and `kept`, the decay over it);
the second starts each segment from the contributions of those before it. Few sequences and heads fill the machine so;
when there are many, a segment is the whole sequence and the first launch falls away.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, n chunks of Q tokens.
Numbers  states in float32; those of single chunks are kept in the inputs' type, as they next enter a matrix product.
Cost     a chunk: 2 Q N P FLOPs; reads Q (P + N) elements (those with N from L2, shared by a group's heads), and writes
         P N where the states of chunks are kept.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from plait.kernels.triton.ssd_chunk import carried, decays, load_tile, product, store_tile


@triton.jit
def walk(
    v, K, dt, a, begun, first, totals, kept, each, last,
    v_b, v_l, v_h, v_p, K_b, K_l, K_g, K_n,
    L, H, heads_per_group, n_padded, segment, n_segments,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, Q: tl.constexpr,
    BACKWARDS: tl.constexpr, ADD_UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (h, s, b): the s-th segment in walking order. ADD_UP writes totals and kept, else they are read."""
    h, s, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = (n_segments - 1 - s if BACKWARDS else s) * segment
    n_chunks = tl.cdiv(tl.minimum(segment, L - begin), Q)
    t = (begin + (n_chunks - 1) * Q if BACKWARDS else begin).to(tl.int64)
    v += b * v_b + h * v_h
    K += b * K_b + (h // heads_per_group) * K_g
    dt += (b * H + h) * n_padded
    a += (b * H + h) * n_padded
    if begun is not None:
        begun += b * n_padded
    if ADD_UP:
        S = tl.zeros((PB, NB), tl.float32)
    else:
        S = carried(first, totals, kept, b, h, H, s, n_segments, P, N, PB, NB)
    left = 1.0
    for _ in range(n_chunks):
        v_tile = load_tile(v + t * v_l, v_l, v_p, L - t, P, Q, PB)
        K_tile = load_tile(K + t * K_l, K_l, K_n, L - t, N, Q, NB).to(v_tile.dtype)
        step, _, _, from_begin, to_end, keep = decays(dt, a, begun, t, Q)
        if each is not None:
            at = (b * (n_padded // Q) + t // Q) * H + h
            store_tile(each + at * (P * N), S, N, P, N, PB, NB)
        weight = from_begin if BACKWARDS else to_end * step
        weighted = (v_tile.to(tl.float32) * weight[:, None]).to(v_tile.dtype)
        S = product(tl.trans(weighted), K_tile, S * keep, PRECISION)
        left *= keep
        t += -Q if BACKWARDS else Q
    if ADD_UP:
        at = (b * (n_segments - 1) + s) * H + h
        store_tile(totals + at * (P * N), S, N, P, N, PB, NB)
        tl.store(kept + at, left)
    elif last is not None:
        if s == n_segments - 1:
            store_tile(last + (b * H + h) * (P * N), S, N, P, N, PB, NB)
