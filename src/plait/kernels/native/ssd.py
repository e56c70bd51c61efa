"""The Mamba-2 scan on processors, one group of heads at a time with everything of a chunk in cache.

Equations in kernels/eager/ssd.py; what differs is said in ssd.cpp. The states at the beginnings of chunks are kept for
the backward pass, in the inputs' dtype: bfloat16 halves them, and is what the forward pass multiplied.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from plait.kernels.native import library
from plait.kernels.native.library import call

CHUNK = 64
# rows and columns of the kernels' tiles on the widest processor
TILE = 32


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_limit: tuple[float, float],
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the last state as ops.ssd defines them; x, B, C share a dtype, A, D, dt_bias and the state are float32."""
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (D, dt_bias, initial_state))
    starts, mask = (None if t is None else t.bool().contiguous() for t in (starts, mask))
    limit = (float(dt_limit[0]), float(dt_limit[1]))
    return Scan.apply(x, dt, A.contiguous(), B, C, D, dt_bias, initial_state, limit, starts, mask, keep)


class Scan(torch.autograd.Function):
    """y, last state = apply(the arguments of `scan`, whether to keep what the backward pass needs)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial: Tensor | None,
        limit: tuple[float, float],
        starts: Tensor | None,
        mask: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        b, L, H, P = x.shape
        N = B.shape[3]
        y = torch.empty(x.shape, dtype=x.dtype)
        last = torch.empty(b, H, P, N, dtype=torch.float32)
        rows, columns = (-(-n // TILE) * TILE for n in (N, P))
        # what the kernel multiplies: bfloat16 only where the processor does
        operand = x.dtype if library.target() == "avx512" else torch.float32
        states = torch.empty(b, H, -(-L // CHUNK), rows, columns, dtype=operand) if keep else None
        halves = (x.dtype == torch.bfloat16, dt.dtype == torch.bfloat16)
        inputs = (_shape(x, dt, B, C), x, dt, A, B, C, D, dt_bias, *limit)
        call("ssd", "ssd_forward", *halves, *inputs, initial, starts, mask, y, last, states)
        if keep:
            ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial, starts, mask, states)  # type: ignore[arg-type]
            ctx.limit = limit  # type: ignore[attr-defined]
            ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, A, B, C, D, dt_bias, initial, starts, mask, states = ctx.saved_tensors  # type: ignore[attr-defined]
        b, _, H, _ = x.shape
        dy = torch.zeros_like(x) if dy is None else dy if dy.stride(-1) == 1 else dy.contiguous()
        dlast = None if dlast is None else dlast.contiguous()
        shape = _shape(x, dt, B, C, dy)
        splits = _splits(b * B.shape[2], H // B.shape[2])
        dx, ddt = torch.empty(x.shape, dtype=x.dtype), torch.empty(dt.shape, dtype=dt.dtype)
        dB, dC = (torch.empty(splits, *B.shape, dtype=B.dtype) for _ in "BC")
        # each batch entry for itself: two tasks must not add to one number
        dA = torch.empty(b, H)
        dD, dbias = (None if t is None else torch.empty(b, H) for t in (D, dt_bias))
        dinitial = None if initial is None else torch.empty(initial.shape)
        halves = (x.dtype == torch.bfloat16, dt.dtype == torch.bfloat16)
        inputs = (shape, x, dt, A, B, C, D, dt_bias, *ctx.limit, starts, mask, states, dy, dlast)  # type: ignore[attr-defined]
        call("ssd_backward", "ssd_backward", *halves, *inputs, dx, ddt, dA, dB, dC, dD, dbias, dinitial)
        dA, dD, dbias = (None if t is None else t.sum(0) for t in (dA, dD, dbias))
        dB, dC = (t[0] if splits == 1 else t.sum(0) for t in (dB, dC))
        return dx, ddt, dA, dB, dC, dD, dbias, dinitial, None, None, None, None


def _shape(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dy: Tensor | None = None) -> Tensor:
    """Sizes and strides as the struct `Shape` of ssd.h."""
    b, L, H, P = x.shape
    G, N = B.shape[2:]
    splits = _splits(b * G, H // G)
    strides = [stride for t in (x, dt, B, C, x if dy is None else dy) for stride in t.stride()[:3]]
    return torch.tensor([b, L, H, P, G, N, CHUNK, splits, *strides])


def _splits(groups: int, heads: int) -> int:
    """In how many shares to divide the heads of a group so that every thread has work."""
    threads = torch.get_num_threads()
    return next((n for n in range(1, heads) if heads % n == 0 and groups * n >= threads), heads)
