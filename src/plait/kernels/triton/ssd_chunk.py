"""What every kernel of the scan needs of one chunk: its decays, its tiles, its matrix products.

With dt_j the time steps of a chunk of Q tokens and a_j the running sum of dt A in units of log2 (see ssd_steps.py):

    visible_ij   j <= i, and no document starts in (j, i]
    from_begin_i = 2^a_i           what is left at token i of the state before the chunk; 0 behind a document's start
    to_end_j     = 2^(a_Q - a_j)   what is left of token j at the chunk's end; 0 before a document's start
    keep         = 2^a_Q           what is left of the state before the chunk at its end

Shapes   Q tokens of a chunk, P head size, N state size; tiles are padded to powers of two of at least 16 with zeros.
Numbers  all float32 but the operands of `product`, which keep the inputs' type for the tensor cores.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 tiles wrongly, float32 ones rightly
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, added up in float32; total may be None."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=total, input_precision=PRECISION)


@triton.jit
def load_tile(first, row, column, n_rows, n_columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A (ROWS, COLUMNS) tile at pointer `first`, zero beyond (n_rows, n_columns)."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(first + i * row + j * column, mask=(i < n_rows) & (j < n_columns), other=0.0)


@triton.jit
def store_tile(first, tile, row, n_rows, n_columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_tile`, for columns side by side; rounds to the type of `first`."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(first + i * row + j, tile.to(first.dtype.element_ty), mask=(i < n_rows) & (j < n_columns))


@triton.jit
def decays(dt, a, begun, t, Q: tl.constexpr):
    """dt, a, begun, from_begin, to_end (Q,) and the number keep, of the chunk at token t; memory ends on a chunk."""
    i, end = t + tl.arange(0, Q), t + Q - 1
    step, log, log_end = tl.load(dt + i), tl.load(a + i), tl.load(a + end)
    from_begin, to_end, keep = tl.exp2(log), tl.exp2(log_end - log), tl.exp2(log_end)
    count = i
    if begun is not None:
        count, count_end = tl.load(begun + i), tl.load(begun + end)
        from_begin = tl.where(count == 0, from_begin, 0.0)
        to_end = tl.where(count == count_end, to_end, 0.0)
        keep = tl.where(count_end == 0, keep, 0.0)
    return step, log, count, from_begin, to_end, keep


@triton.jit
def between(a, begun, Q: tl.constexpr, STARTS: tl.constexpr):
    """2^(a_i - a_j) where token i sees token j, else zero: (Q, Q)."""
    i = tl.arange(0, Q)
    visible = i[:, None] >= i[None, :]
    if STARTS:
        visible = visible & (begun[:, None] == begun[None, :])
    # above the diagonal the exponent is positive and would overflow
    return tl.exp2(tl.where(visible, a[:, None] - a[None, :], float("-inf")))


@triton.jit
def carried(
    first, totals, kept, b, h, H, s, n_segments,
    P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The state before segment s, from that before the first segment and what each one before s adds."""
    S = tl.zeros((PB, NB), tl.float32)
    if first is not None:
        S = load_tile(first + (b * H + h) * (P * N), N, 1, P, N, PB, NB).to(tl.float32)
    if totals is not None:
        for k in range(s):
            at = (b * (n_segments - 1) + k) * H + h
            S = S * tl.load(kept + at) + load_tile(totals + at * (P * N), N, 1, P, N, PB, NB)
    return S
