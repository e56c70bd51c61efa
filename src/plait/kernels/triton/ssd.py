"""The Mamba-2 scan as a differentiable function on a GPU: which kernels run, over what blocks.

Forwards: `steps` (dt and its running sums), `walk` (what each segment of the sequence does to the state), `scan` (every
segment from its start: y). With enough sequences and heads to fill the machine, a segment is the whole sequence and
`walk` falls away. Backwards: `steps`, `walk` for the state before each chunk, `walk` backwards for the gradient of the
state after it (twice if there are segments), `gradients` for the rest, one chunk at a time, and `step_gradients`.

Expected on an H200 (4.3 TB/s, 790 TFLOP/s in bfloat16) at L 8,192, H 128, P 64, N 128, G 8, four segments (see `cost`):

    forwards    73 GFLOP  0.42 GB      92 us of products,  98 us of traffic
    backwards  136 GFLOP  1.95 GB     173 us of products, 454 us of traffic, more than half of it the states of chunks

The forward pass is bound by neither but by the chain of four products and nine barriers that make a chunk: 512
programs of 32 chunks, two at a time on each of 132 multiprocessors, take 220 us at 6,000 cycles a chunk, 110 at 3,000.
This is arithmetic and the compiler's account of registers; nothing was timed on a GPU yet.

Shapes   b batch, L time, H heads, G groups, P head size, N state size, n = L / Q chunks.
Numbers  as ops.ssd: float32 but for matrix products' operands, which are rounded to the type of x. In float16 the
         states of chunks and the sums over heads of Z are such operands too: they must stay below 65,504.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plait.kernels.triton.ssd_backward import gradients
from plait.kernels.triton.ssd_forward import scan
from plait.kernels.triton.ssd_states import walk
from plait.kernels.triton.ssd_steps import step_gradients, steps
from plait.kernels.triton.tuning import DEFAULTS, Config, config

# a large GPU has 132 multiprocessors; two to four programs on each hide each other's waits
PROGRAMS = 528
SHORTEST_SEGMENT = 256
LONGEST_CHUNK = 128
HEADS = 32
# rows without an end are for states up to 64 x 128 in 16 bits, `_large` up to 128 x 128, `_largest` beyond and float32.
# Q tokens of a chunk; compiled for Hopper `scan` needs 92 KB of shared memory and spills 64 words a thread, so that two
# programs share a multiprocessor; `gradients`, which holds the sums of dB, dC and Z, spills 160 words and has one alone
DEFAULTS["ssd_scan"] = {"Q": 64, "num_warps": 4, "num_stages": 2}
DEFAULTS["ssd_scan_large"] = {"Q": 64, "num_warps": 8, "num_stages": 2}
DEFAULTS["ssd_scan_largest"] = {"Q": 32, "num_warps": 8, "num_stages": 1}
DEFAULTS["ssd_gradients"] = {"Q": 64, "num_warps": 8, "num_stages": 2}
DEFAULTS["ssd_gradients_large"] = {"Q": 64, "num_warps": 8, "num_stages": 2}
DEFAULTS["ssd_gradients_largest"] = {"Q": 32, "num_warps": 8, "num_stages": 1}
DEFAULTS["ssd_walk"] = {"num_warps": 4, "num_stages": 3}
DEFAULTS["ssd_walk_large"] = {"num_warps": 8, "num_stages": 3}
DEFAULTS["ssd_walk_largest"] = {"num_warps": 8, "num_stages": 1}


@torch.compiler.assume_constant_result
def _config(kernel: str, P: int, N: int, size: int) -> Config:
    state = size * P * N if size == 2 else 1 << 20
    return config(f"{kernel}{'' if state <= 16384 else '_large' if state <= 32768 else '_largest'}", P=P, N=N)


@torch.compiler.assume_constant_result
def _precision() -> str:
    # three tf32 products make one of float32; "ieee" would leave the tensor cores, and run out of registers
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class Cut:
    """The sizes of a scan, and how it is cut up."""

    b: int
    L: int
    H: int
    G: int
    P: int
    N: int
    Q: int
    segment: int
    size: int

    @property
    def n_chunks(self) -> int:
        return -(-self.L // self.Q)

    @property
    def n_padded(self) -> int:
        return self.n_chunks * self.Q

    @property
    def n_segments(self) -> int:
        return -(-self.L // self.segment)

    @property
    def parts(self) -> int:
        """Programs that share a group's heads: one, unless the chunks are too few to fill the machine."""
        return min(self.H // self.G, max(1, PROGRAMS // 2 // (self.b * self.n_chunks * self.G)))

    def blocks(self) -> dict[str, int | str]:
        """The constants of every kernel that works on tiles."""
        PB, NB = (max(16, triton.next_power_of_2(size)) for size in (self.P, self.N))
        return {"P": self.P, "N": self.N, "PB": PB, "NB": NB, "Q": self.Q, "PRECISION": _precision()}

    def config(self, kernel: str) -> Config:
        """The warps and stages to launch a kernel with."""
        row = _config(kernel, self.P, self.N, self.size)
        return {"num_warps": row["num_warps"], "num_stages": row["num_stages"]}


def cut(kernel: str, b: int, L: int, H: int, G: int, P: int, N: int, size: int, chunk: int = 128) -> Cut:
    """Cut a scan into chunks that fit a kernel's registers, and into enough segments to fill the machine.

    Args:
        kernel: "ssd_scan" or "ssd_gradients".
        b, L, H, G, P, N: sizes.
        size: bytes of an element.
        chunk: the longest chunk wanted.

    Returns: the cut; its segments do not depend on the kernel.
    """
    longest = 1 << max(chunk, 1).bit_length() - 1
    Q = max(16, min(_config(kernel, P, N, size)["Q"], longest))
    segments = max(1, min(PROGRAMS // (b * H), L // SHORTEST_SEGMENT))
    segment = -(-L // (segments * LONGEST_CHUNK)) * LONGEST_CHUNK
    return Cut(b, L, H, G, P, N, Q, segment, size)


def cost(b: int, L: int, H: int, G: int, P: int, N: int, size: int, chunk: int = 128) -> dict[str, tuple[int, int]]:
    """FLOPs of matrix products, and bytes that travel, if B and C stay in L2: "forward" and "backward".

    Args:
        b, L, H, G, P, N: sizes.
        size: bytes of an element.
        chunk: the longest chunk wanted.

    Returns: (FLOPs, bytes) of each pass.
    """
    T, c = b * L, cut("ssd_scan", b, L, H, G, P, N, size, chunk)
    # per token: x of all heads; B of all groups; dt raw, and dt and a written and read
    x, B, times = T * H * P * size, T * G * N * size, T * H * (size + 16)
    state, again = 2 * T * H * P * N, (c.n_segments - 1) / c.n_segments
    forward = state * (2 + again) + 2 * T * H * c.Q * (P + N), x * (2 + again) + B * 2 + times
    c = cut("ssd_gradients", b, L, H, G, P, N, size, chunk)
    states = b * c.n_chunks * H * P * N * size
    flops = state * (6 + again) + 4 * T * H * c.Q * P + 6 * T * G * c.parts * c.Q * N
    moved = x * (5 + again) + B * 4 + 4 * states + times + T * H * (2 * size + 16)
    return {"forward": (int(forward[0]), int(forward[1])), "backward": (int(flops), int(moved))}


@dataclass(frozen=True)
class Times:
    """What `steps` reads, and what it writes: dt and a (b, H, n Q), begun (b, n Q)."""

    raw: Tensor
    A: Tensor
    bias: Tensor | None
    starts: Tensor | None
    mask: Tensor | None
    low: float
    high: float

    def steps(self, c: Cut) -> tuple[Tensor, Tensor, Tensor | None]:
        dt, a = (self.raw.new_empty(c.b, c.H, c.n_padded, dtype=torch.float32) for _ in range(2))
        begun = None if self.starts is None else self.raw.new_empty(c.b, c.n_padded, dtype=torch.int32)
        steps[c.n_chunks, -(-c.H // HEADS), c.b](
            self.raw, self.A, self.bias, self.starts, self.mask, self.low, self.high, dt, a, begun,
            *self.raw.stride(), c.L, c.H, c.n_padded, Q=c.Q, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
        return dt, a, begun

    def gradients(self, c: Cut, d_dt: Tensor, d_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d raw (b, L, H), and dA and d bias (H,) in float32."""
        d_raw = self.raw.new_empty(c.b, c.L, c.H)
        dA, d_bias = (d_a.new_empty(c.b, c.n_chunks, c.H) for _ in range(2))
        step_gradients[c.n_chunks, -(-c.H // HEADS), c.b](
            self.raw, self.A, self.bias, self.mask, self.low, self.high, d_dt, d_a, d_raw, dA, d_bias,
            *self.raw.stride(), c.L, c.H, c.n_padded, Q=c.Q, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
        return d_raw, dA.sum((0, 1)), d_bias.sum((0, 1))


def _totals(c: Cut, v: Tensor, K: Tensor, times: tuple, backwards: bool) -> tuple[Tensor | None, Tensor | None]:
    """What each segment but the last adds to the state, and how much it keeps of it; nothing for a single segment."""
    if c.n_segments == 1:
        return None, None
    totals = v.new_empty(c.b, c.n_segments - 1, c.H, c.P, c.N, dtype=torch.float32)
    kept = totals.new_empty(c.b, c.n_segments - 1, c.H)
    walk[c.H, c.n_segments - 1, c.b](
        v, K, *times, None, totals, kept, None, None, *v.stride(), *K.stride(),
        c.L, c.H, c.H // c.G, c.n_padded, c.segment, c.n_segments,
        BACKWARDS=backwards, ADD_UP=True, **c.blocks(), **c.config("ssd_walk"),
    )  # fmt: skip
    return totals, kept


def _states(
    c: Cut, v: Tensor, K: Tensor, times: tuple, first: Tensor | None, totals: tuple, backwards: bool
) -> tuple[Tensor, Tensor | None]:
    """The state at the near end of each chunk (b, n, H, P, N); backwards also the last one, (b, H, P, N)."""
    each = v.new_empty(c.b, c.n_chunks, c.H, c.P, c.N)
    last = v.new_empty(c.b, c.H, c.P, c.N, dtype=torch.float32) if backwards else None
    walk[c.H, c.n_segments, c.b](
        v, K, *times, first, *totals, each, last, *v.stride(), *K.stride(),
        c.L, c.H, c.H // c.G, c.n_padded, c.segment, c.n_segments,
        BACKWARDS=backwards, ADD_UP=False, **c.blocks(), **c.config("ssd_walk"),
    )  # fmt: skip
    return each, last


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
        b, L, H, P = x.shape
        c = cut("ssd_scan", b, L, H, B.shape[2], P, B.shape[3], x.element_size(), chunk)
        S, starts, mask = (None if t is None else t.contiguous() for t in (S, starts, mask))
        times = Times(dt, A, bias, starts, mask, low, high).steps(c)
        totals = _totals(c, x, B, times, False)
        y = x.new_empty(x.shape)
        last = x.new_empty(c.b, c.H, c.P, c.N, dtype=torch.float32)
        scan[c.H, c.n_segments, c.b](
            x, B, C, D, *times, S, *totals, y, last, *x.stride(), *B.stride(), *C.stride(),
            c.L, c.H, c.H // c.G, c.n_padded, c.segment, c.n_segments, **c.blocks(), **c.config("ssd_scan"),
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, bias, S, starts, mask, *totals)
        ctx.rest = chunk, low, high
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor | None, dS: Tensor | None) -> tuple:  # type: ignore[override]
        x, dt, A, B, C, D, bias, S, starts, mask, *totals = ctx.saved_tensors
        chunk, low, high = ctx.rest
        b, L, H, P = x.shape
        c = cut("ssd_gradients", b, L, H, B.shape[2], P, B.shape[3], x.element_size(), chunk)
        dy = torch.zeros_like(x) if dy is None else dy
        dS = None if dS is None else dS.contiguous()
        clock = Times(dt, A, bias, starts, mask, low, high)
        times = clock.steps(c)
        states, _ = _states(c, x, B, times, S, tuple(totals), False)
        state_gradients, d_first = _states(c, dy, C, times, dS, _totals(c, dy, C, times, True), True)
        share = -(-(c.H // c.G) // c.parts)
        parts = -(-(c.H // c.G) // share)
        dx = x.new_empty(x.shape)
        d_dt, d_a = (torch.empty_like(times[0]) for _ in range(2))
        # a group's heads in one program: its sum is final; in several: float32 shares, added up after
        dB, dC = (t.new_empty(parts, *t.shape, dtype=t.dtype if parts == 1 else torch.float32) for t in (B, C))
        dD = d_a.new_empty(c.b, c.n_chunks, c.H)
        gradients[c.n_chunks, parts * c.G, c.b](
            x, B, C, D, *times, dy, states, state_gradients, dx, d_dt, d_a, dB, dC, dD,
            *x.stride(), *B.stride(), *C.stride(), *dy.stride(),
            c.L, c.H, c.G, c.H // c.G, share, c.n_padded, **c.blocks(), **c.config("ssd_gradients"),
        )  # fmt: skip
        d_raw, dA, d_bias = clock.gradients(c, d_dt, d_a)
        return (
            dx, d_raw, dA.to(A.dtype),
            dB.squeeze(0) if parts == 1 else dB.sum(0).to(B.dtype),
            dC.squeeze(0) if parts == 1 else dC.sum(0).to(C.dtype),
            None if D is None else dD.sum((0, 1)).to(D.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None if S is None or d_first is None else d_first.to(S.dtype),
            None, None, None, None, None,
        )  # fmt: skip
