"""RMS norm on GPUs, alone or with the addition to the residual stream before it: one pass over memory each way.

    t = x (+ residual),  r = 1 / sqrt(mean(t^2) + eps),  y = w t r
    with h = dy w:   dt = r h - t r^3 mean(t h) (+ the residual's gradient),  dw = sum over rows of dy t r

A program holds whole rows in registers, several at once where rows are short. Backwards, few programs walk many rows
each: they add up their part of dw in registers and write it once; one sum over programs ends it.

Shapes   R rows, D channels.
Bytes    forward 2 R D numbers (4 R D with the residual), backward 3 R D (4 R D), and a float32 per row.
Numbers  float32 inside. With a residual, y is the norm of t as stored, so that it equals adding and norming apart.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, Config, config

Ctx = torch.autograd.function.FunctionCtx

# NUMBERS: of a tile, in registers; PER_SM: programs that walk tiles, for every multiprocessor;
# STAGES: how many tiles ahead they load
DEFAULTS["rms_norm"] = {"NUMBERS": 4096, "num_warps": 8}
DEFAULTS["rms_norm_backward"] = {"NUMBERS": 4096, "PER_SM": 2, "STAGES": 2, "num_warps": 8}


def rows(x: Tensor) -> Tensor:
    """(..., D) as (R, D) with D contiguous: without a copy where rows lie evenly spaced."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def tile(kernel: str, D: int) -> tuple[dict[str, int], Config]:
    """How rows of D numbers are cut: keywords BLOCK (at least D), ROWS, num_warps; and the row of the table behind."""
    c, block = config(kernel, D=D), triton.next_power_of_2(D)
    # a row longer than a tile gets more threads, lest they run out of registers
    warps = min(16, c["num_warps"] * max(1, block // c["NUMBERS"]))
    return {"BLOCK": block, "ROWS": max(1, c["NUMBERS"] // block), "num_warps": warps}, c


def stages(c: Config, cut: dict[str, int]) -> int:
    """How many tiles a walking program holds in shared memory: no more than fit, however wide the row."""
    return c["STAGES"] if cut["BLOCK"] <= 4096 else 1


def walkers(x: Tensor, n_tiles: int, per_sm: int, groups: int = 1) -> int:
    """How many programs share the n_tiles of each group: per_sm for every multiprocessor over all groups."""
    n = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return max(1, min(n_tiles, n * per_sm // groups))


class RMSNorm(torch.autograd.Function):
    """y = apply(x, w, eps)."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, _, r = _normalise(x, None, w, eps)
        ctx.save_for_backward(x, w, r)
        return y

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        dx, dw = _gradients(x, w, r, dy, None)
        return dx, dw, None


class AddRMSNorm(torch.autograd.Function):
    """y, new residual = apply(x, residual, w, eps)."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, r = _normalise(x, residual, w, eps)
        ctx.save_for_backward(total, w, r)
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype  # type: ignore[attr-defined]
        return y, total

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        if dy is None:
            # only the residual was used
            return None if dtotal is None else dtotal.to(ctx.dtype), dtotal, None, None  # type: ignore[attr-defined]
        d, dw = _gradients(total, w, r, dy, dtotal)
        return d.to(ctx.dtype), d, dw, None  # type: ignore[attr-defined]


def _normalise(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum of x and the residual (x without one), and r (R,)."""
    x_RD, cut = rows(x), tile("rms_norm", x.shape[-1])[0]
    R, D = x_RD.shape
    y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(R, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    old = x_RD if residual is None else rows(residual)
    grid = (triton.cdiv(R, cut["ROWS"]),)
    added = residual is not None
    _forward[grid](x_RD, old, w, y, total, r, R, D, x_RD.stride(0), old.stride(0), eps, ADD=added, **cut)
    return y, total, r


def _gradients(x: Tensor, w: Tensor, r: Tensor, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor]:
    """Those of x (in its dtype, and with dtotal added) and w."""
    x_RD, dy_RD = rows(x), rows(dy)
    R, D = x_RD.shape
    cut, c = tile("rms_norm_backward", D)
    n = walkers(x, triton.cdiv(R, cut["ROWS"]), c["PER_SM"])
    dx, parts = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(n, D, dtype=torch.float32)
    more = dy_RD if dtotal is None else rows(dtotal)
    strides = (x_RD.stride(0), dy_RD.stride(0), more.stride(0))
    _backward[(n,)](
        x_RD, w, r, dy_RD, more, dx, parts, R, D, *strides, ADD=dtotal is not None, STAGES=stages(c, cut), **cut
    )
    return dx, parts.sum(0).to(w.dtype)


@triton.jit
def _forward(
    x_ptr,
    residual_ptr,
    w_ptr,
    y_ptr,
    total_ptr,
    r_ptr,
    R,
    D,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    here = (row < R)[:, None] & (col < D)[None, :]
    out = row[:, None] * D + col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=here, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=here, other=0.0).to(tl.float32)
        stored = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, stored, mask=here)
        x = stored.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(r_ptr + row, r, mask=row < R)
    tl.store(y_ptr + out, x * r[:, None] * w[None, :], mask=here)


@triton.jit
def _backward(
    x_ptr,
    w_ptr,
    r_ptr,
    dy_ptr,
    dtotal_ptr,
    dx_ptr,
    parts_ptr,
    R,
    D,
    x_stride,
    dy_stride,
    dtotal_stride,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = (row < R)[:, None] & (col < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=here, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < R, other=0.0)[:, None]
        if ADD:
            dtotal = tl.load(dtotal_ptr + row[:, None] * dtotal_stride + col[None, :], mask=here, other=0.0)
        h = dy * w[None, :]
        dx = r * (h - x * (r * r * tl.sum(x * h, axis=1)[:, None] / D))
        if ADD:
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + row[:, None] * D + col[None, :], dx, mask=here)
        dw += dy * x * r
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + col, tl.sum(dw, axis=0), mask=col < D)
