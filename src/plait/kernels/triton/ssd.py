"""The Mamba-2 scan as a differentiable function on a GPU: which kernels run, over what blocks.

Forwards, two launches: `walk` adds up what each segment of the sequence does to the state, `scan` starts every segment
from there and writes y. With enough sequences and heads to fill the machine a segment is the whole sequence, and `scan`
runs alone. Backwards, three or four: `walk` again for the state before each chunk, `walk` backwards for the gradient of
the state after it (twice if there are segments), `gradients` for all the rest, one chunk at a time.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, n = L / Q chunks.
Numbers  as ops.ssd: float32 but for matrix products' operands, which are rounded to the type of x.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plait.kernels.triton.ssd_backward import gradients
from plait.kernels.triton.ssd_forward import scan
from plait.kernels.triton.ssd_states import walk

# a large GPU runs about four programs on each of 132 multiprocessors at a time
PROGRAMS = 528
SHORTEST_SEGMENT = 256


@dataclass(frozen=True)
class Sizes:
    """Sizes of a scan and how it is cut up."""

    b: int
    L: int
    H: int
    G: int
    P: int
    N: int
    segment: int
    n_segments: int
    Q: int
    precision: str

    @property
    def n_chunks(self) -> int:
        return triton.cdiv(self.L, self.Q)

    def blocks(self) -> dict[str, object]:
        """The constants that every kernel takes."""
        PB, NB = (max(16, triton.next_power_of_2(size)) for size in (self.P, self.N))
        return {"P": self.P, "N": self.N, "PB": PB, "NB": NB, "Q": self.Q, "PRECISION": self.precision}


def sizes(x: Tensor, B: Tensor, chunk: int) -> Sizes:
    """How to cut up a scan: enough segments to fill the machine, chunks that fit its registers."""
    b, L, H, P = x.shape
    G, N = B.shape[2:]
    n = max(1, min(PROGRAMS // (b * H), L // SHORTEST_SEGMENT))
    # a multiple of every chunk length
    segment = triton.cdiv(triton.cdiv(L, n), 128) * 128
    longest = 64 if x.element_size() == 2 else 32
    Q = max(16, min(longest, triton.next_power_of_2(chunk + 1) // 2))
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return Sizes(b, L, H, G, P, N, segment, triton.cdiv(L, segment), Q, precision)


def _walk(
    z: Sizes, v: Tensor, K: Tensor, steps: tuple, first: Tensor | None, totals: tuple, backwards: bool, add_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Launch `walk`; returns the state at each chunk's near end (b, n, H, P, N) and at the walk's end, unless adding up."""
    dt = steps[0]
    each = last = None
    if not add_up:
        each = v.new_empty(z.b, z.n_chunks, z.H, z.P, z.N)
        last = dt.new_empty(z.b, z.H, z.P, z.N, dtype=torch.float32) if backwards else None
    grid = (z.H, z.n_segments - 1 if add_up else z.n_segments, z.b)
    walk[grid](
        v, K, *steps, first, *totals, each, last, *v.stride(), *K.stride(), *dt.stride(),
        z.L, z.H, z.H // z.G, z.segment, z.n_segments, BACKWARDS=backwards, ADD_UP=add_up, **z.blocks(),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return each, last


def _totals(z: Sizes, v: Tensor, K: Tensor, steps: tuple, backwards: bool) -> tuple[Tensor | None, Tensor | None]:
    """What each segment but the last adds to the state, and how much of the state it keeps; nothing without segments."""
    if z.n_segments == 1:
        return None, None
    totals = v.new_empty(z.b, z.n_segments - 1, z.H, z.P, z.N, dtype=torch.float32)
    kept = v.new_empty(z.b, z.n_segments - 1, z.H, dtype=torch.float32)
    _walk(z, v, K, steps, None, (totals, kept), backwards, True)
    return totals, kept


class Scan(torch.autograd.Function):
    """y, last state = apply(x, dt, A, B, C, D, dt_bias, S, starts, mask, low, high, chunk), as `ops.ssd`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        bias: Tensor | None,
        S: Tensor | None,
        starts: Tensor | None,
        mask: Tensor | None,
        low: float,
        high: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        z = sizes(x, B, chunk)
        S, starts, mask = (None if t is None else t.contiguous() for t in (S, starts, mask))
        steps = (dt, A, bias, starts, mask, low, high)
        totals, kept = _totals(z, x, B, steps, False)
        y = x.new_empty(x.shape)
        last = x.new_empty(z.b, z.H, z.P, z.N, dtype=torch.float32)
        scan[z.H, z.n_segments, z.b](
            x, B, C, dt, A, D, *steps[2:], S, totals, kept, y, last,
            *x.stride(), *B.stride(), *C.stride(), *dt.stride(),
            z.L, z.H, z.H // z.G, z.segment, z.n_segments, **z.blocks(), num_warps=4, num_stages=2,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, bias, S, starts, mask, totals, kept)  # type: ignore[arg-type]
        ctx.rest = z, low, high  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor | None, dS: Tensor | None) -> tuple:  # type: ignore[override]
        x, dt, A, B, C, D, bias, S, starts, mask, totals, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        z, low, high = ctx.rest  # type: ignore[attr-defined]
        dy = torch.zeros_like(x) if dy is None else dy
        dS = None if dS is None else dS.contiguous()
        steps = (dt, A, bias, starts, mask, low, high)
        states, _ = _walk(z, x, B, steps, S, (totals, kept), False, False)
        state_gradients, d_first = _walk(z, dy, C, steps, dS, _totals(z, dy, C, steps, True), True, False)

        parts = min(z.H // z.G, max(1, PROGRAMS // 2 // (z.b * z.n_chunks * z.G)))
        share = triton.cdiv(z.H // z.G, parts)
        parts = triton.cdiv(z.H // z.G, share)
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        # a group's heads in one program: its sum is final; in several: float32 shares, added up after
        shares = [t.new_empty(parts, *t.shape, dtype=t.dtype if parts == 1 else torch.float32) for t in (B, C)]
        per_chunk = x.new_empty(3, z.b, z.n_chunks, z.H, dtype=torch.float32)
        gradients[z.n_chunks, parts * z.G, z.b](
            x, B, C, dt, A, D, *steps[2:], dy, states, state_gradients, dx, ddt, *shares, per_chunk,
            *x.stride(), *B.stride(), *C.stride(), *dt.stride(), *dy.stride(),
            z.L, z.H, z.G, z.H // z.G, share, **z.blocks(), num_warps=8, num_stages=2,
        )  # fmt: skip
        dB, dC = (t[0] if parts == 1 else t.sum(0).to(B.dtype) for t in shares)
        dA, dD, d_bias = per_chunk.sum((1, 2))
        return (
            dx, ddt, dA.to(A.dtype), dB, dC,
            None if D is None else dD.to(D.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None if S is None or d_first is None else d_first.to(S.dtype),
            None, None, None, None, None,
        )  # fmt: skip
