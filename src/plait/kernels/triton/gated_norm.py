"""The gated norm of a Mamba-2 mixer on GPUs: gate, statistics of each group and scale in one pass each way.

    s = silu(z),  u = x s,  r = 1 / sqrt(mean_g(u^2) + eps),  y = w u r
    with h = dy w:   du = r h - u r^3 mean_g(u h),  dx = du s,  dz = du x silu'(z),  dw = sum over rows of dy u r

A program takes one group of several rows, so that w (and its part of dw) is loaded once for all of them; neighbouring
programs take neighbouring groups of the same rows. x and z may be slices of wider rows, as a projection leaves them.

Shapes   R rows, G groups of P channels, D = G P.
Bytes    forward 3 R D numbers, backward 5 R D, and a float32 per group of a row.
Numbers  float32 inside; one rounding at the end.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.norm import rows, stages, tile, walkers
from plait.kernels.triton.tuning import DEFAULTS

Ctx = torch.autograd.function.FunctionCtx

DEFAULTS["gated_rmsnorm"] = {"NUMBERS": 4096, "num_warps": 8}
DEFAULTS["gated_rmsnorm_backward"] = {"NUMBERS": 2048, "PER_SM": 2, "STAGES": 2, "num_warps": 8}


class GatedRMSNorm(torch.autograd.Function):
    """y = apply(x, z, w, groups, eps)."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, z: Tensor, w: Tensor, groups: int, eps: float) -> Tensor:
        x_RD, z_RD = rows(x), rows(z)
        R, D = x_RD.shape
        P = D // groups
        cut = tile("gated_rmsnorm", P)[0]
        y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        r = torch.empty(R, groups, dtype=torch.float32, device=z.device)
        grid = (groups * triton.cdiv(R, cut["ROWS"]),)
        _forward[grid](x_RD, z_RD, w, y, r, R, groups, P, x_RD.stride(0), z_RD.stride(0), eps, **cut)
        ctx.save_for_backward(x, z, w, r)
        return y

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, w, r = ctx.saved_tensors  # type: ignore[attr-defined]
        x_RD, z_RD, dy_RD = rows(x), rows(z), rows(dy)
        R, D = x_RD.shape
        G = r.shape[1]
        cut, c = tile("gated_rmsnorm_backward", D // G)
        n = walkers(x, triton.cdiv(R, cut["ROWS"]), c["PER_SM"], G)
        dx, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
        parts = torch.empty(n, D, dtype=torch.float32, device=x.device)
        strides = (x_RD.stride(0), z_RD.stride(0), dy_RD.stride(0))
        _backward[(G * n,)](
            x_RD, z_RD, w, r, dy_RD, dx, dz, parts, R, G, D // G, *strides, STAGES=stages(c, cut), **cut
        )
        return dx, dz, parts.sum(0).to(w.dtype), None, None


@triton.jit
def _forward(
    x_ptr,
    z_ptr,
    w_ptr,
    y_ptr,
    r_ptr,
    R,
    G,
    P,
    x_stride,
    z_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % G
    row = (tl.program_id(0) // G).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    here = (row < R)[:, None] & (col < P)[None, :]
    at = (group * P + col)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + at, mask=here, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row[:, None] * z_stride + at, mask=here, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + group * P + col, mask=col < P, other=0.0).to(tl.float32)
    u = x * z * tl.sigmoid(z)
    r = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / P + eps)
    tl.store(r_ptr + row * G + group, r, mask=row < R)
    tl.store(y_ptr + row[:, None] * (G * P) + at, u * r[:, None] * w[None, :], mask=here)


@triton.jit
def _backward(
    x_ptr,
    z_ptr,
    w_ptr,
    r_ptr,
    dy_ptr,
    dx_ptr,
    dz_ptr,
    parts_ptr,
    R,
    G,
    P,
    x_stride,
    z_stride,
    dy_stride,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % G
    walker = tl.program_id(0) // G
    col = tl.arange(0, BLOCK)
    at = (group * P + col)[None, :]
    w = tl.load(w_ptr + group * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(walker, tl.cdiv(R, ROWS), tl.num_programs(0) // G, num_stages=STAGES):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = (row < R)[:, None] & (col < P)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row[:, None] * z_stride + at, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + at, mask=here, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row * G + group, mask=row < R, other=0.0)[:, None]
        gate = tl.sigmoid(z)
        s = z * gate
        u, h = x * s, dy * w
        du = r * (h - u * (r * r * tl.sum(u * h, axis=1)[:, None] / P))
        out = row[:, None] * (G * P) + at
        tl.store(dx_ptr + out, du * s, mask=here)
        tl.store(dz_ptr + out, du * x * (gate + s * (1.0 - gate)), mask=here)
        dw += dy * u * r
    tl.store(parts_ptr + walker.to(tl.int64) * (G * P) + group * P + col, tl.sum(dw, axis=0), mask=col < P)
