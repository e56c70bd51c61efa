"""Rotary position embedding on GPUs: angles, sines and cosines are made where they are used, x is read once.

    (u, v) = (x_i, x_{i + d/2}),  a = t w_i:   u' = c (u cos a - v sin a),  v' = c (v cos a + u sin a)

The gradient of x is that of y turned back by the same angles: the same kernel with the sines' sign changed.

Shapes   B batch, L time, H heads, P head size (contiguous; the rest at any stride), d <= P the rotated part.
Bytes    2 B L H P numbers.
Numbers  angles, sines, cosines and products in float32; one rounding at the end.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

Ctx = torch.autograd.function.FunctionCtx

# NUMBERS: pairs of a tile; many heads share a token's sines, which cost more than the products with them
DEFAULTS["rotate"] = {"NUMBERS": 4096, "num_warps": 4}


class Rotate(torch.autograd.Function):
    """y = apply(x, positions, frequencies, temperature, sign): sign is 1, or -1 to turn back."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, positions: Tensor, frequencies: Tensor, temperature: float, sign: int) -> Tensor:
        (B, L, H, P), half = x.shape, frequencies.shape[0]
        x = x if x.stride(3) == 1 else x.contiguous()
        y = torch.empty(B, L, H, P, dtype=x.dtype, device=x.device)
        c, pairs = config("rotate", P=P), triton.next_power_of_2(half)
        heads = min(triton.next_power_of_2(H), max(1, c["NUMBERS"] // pairs))
        rows = 0 if positions.shape[0] == 1 else positions.stride(0)
        strides = (*x.stride()[:3], rows, positions.stride(1))
        # the first dimension of a grid holds billions, the others 65,535
        _rotate[(B * L, triton.cdiv(H, heads))](
            *(x, positions, frequencies, y, L, H, half, P, *strides, float(temperature)),
            SIGN=sign,
            REST=0 if P == 2 * half else triton.next_power_of_2(P - 2 * half),
            HEADS=heads,
            PAIRS=pairs,
            num_warps=c["num_warps"],
        )
        ctx.save_for_backward(positions, frequencies)
        ctx.how = temperature, sign  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        positions, frequencies = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature, sign = ctx.how  # type: ignore[attr-defined]
        return Rotate.apply(dy, positions, frequencies, temperature, -sign), None, None, None, None


@triton.jit
def _rotate(
    x_ptr,
    positions_ptr,
    frequencies_ptr,
    y_ptr,
    L,
    H,
    half,
    P,
    x_b,
    x_l,
    x_h,
    positions_b,
    positions_l,
    temperature,
    SIGN: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # one program: some heads of one token
    token = tl.program_id(0).to(tl.int64)
    b, t = token // L, token % L
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    at = tl.load(positions_ptr + b * positions_b + t * positions_l).to(tl.float32)
    angle = at * tl.load(frequencies_ptr + pair, mask=pair < half, other=0.0)
    cos = (tl.cos(angle) * temperature)[None, :]
    sin = (tl.sin(angle) * temperature * SIGN)[None, :]
    here = (head < H)[:, None] & (pair < half)[None, :]
    x_ptr += b * x_b + t * x_l + head[:, None] * x_h
    y_ptr += (token * H + head[:, None]) * P
    u = tl.load(x_ptr + pair[None, :], mask=here, other=0.0).to(tl.float32)
    v = tl.load(x_ptr + half + pair[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + pair[None, :], u * cos - v * sin, mask=here)
    tl.store(y_ptr + half + pair[None, :], v * cos + u * sin, mask=here)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)
        there = (head < H)[:, None] & (rest < P)[None, :]
        tl.store(y_ptr + rest[None, :], tl.load(x_ptr + rest[None, :], mask=there), mask=there)
