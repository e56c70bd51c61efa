"""Causal depthwise convolution with SiLU on GPUs: each program walks a stretch of time with the past in registers.

    pre_t = bias + sum_k w_k x_{t-k},  y_t = silu(pre_t)         k = 0 .. 3 back in time, none across a document's start
    g_t = dy_t silu'(pre_t),  dx_s = sum_k w_k g_{s+k},  dw_k = sum_t g_t x_{t-k},  dbias = sum_t g_t

Every input is loaded and converted once, where a tile per tap would do so W times: at these speeds instructions count
as much as bytes. A document's start empties the registers that hold the past. Backwards, the registers also hold the
three unfinished dx; a program walks three tokens past its stretch to finish its last ones, and writes its part of dw
and dbias once; one sum over programs ends it.

Shapes   B batch, L time, D channels (contiguous; time and batch at any stride), W taps, at most 4.
Bytes    forward 2 B L D numbers; backward 3 B L D, and 20 D bytes of float32 parts for every SPAN tokens.
Numbers  float32 inside; one rounding at the end.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, Config, config

MOST_TAPS = 4
# SPAN: tokens that one program walks; STAGES: how many tokens ahead it loads
DEFAULTS["causal_conv1d"] = {"BLOCK": 512, "SPAN": 64, "STAGES": 3, "num_warps": 2}
DEFAULTS["causal_conv1d_backward"] = {"BLOCK": 256, "SPAN": 256, "STAGES": 3, "num_warps": 2}


class CausalConv(torch.autograd.Function):
    """y = apply(x, w, bias, initial, starts, activation)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        starts: Tensor | None,
        activation: bool,
    ) -> Tensor:
        x, w = _even(x), w.contiguous()
        starts = None if starts is None else starts.bool().contiguous().view(torch.uint8)
        (B, L, D), c = x.shape, config("causal_conv1d", D=x.shape[2], L=x.shape[1])
        y = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
        strides = (*x.stride()[:2], *_strides(initial))
        _forward[_grid(x, c)](x, w, bias, initial, starts, y, L, D, *strides, W=w.shape[1], SILU=activation, **c)
        ctx.save_for_backward(x, w, bias, initial, starts)  # type: ignore[arg-type]
        ctx.activation = activation  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, bias, initial, starts = ctx.saved_tensors  # type: ignore[attr-defined]
        (B, L, D), W, dy = x.shape, w.shape[1], _even(dy)
        c = config("causal_conv1d_backward", D=D, L=L)
        dx = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
        dinitial = None if initial is None else torch.zeros(B, D, W, dtype=initial.dtype, device=x.device)
        parts = torch.empty(B, triton.cdiv(L, c["SPAN"]), MOST_TAPS + 1, D, dtype=torch.float32, device=x.device)
        strides = (*x.stride()[:2], *dy.stride()[:2], *_strides(initial))
        given, made = (x, w, bias, initial, starts, dy), (dx, dinitial, parts)
        _backward[_grid(x, c)](*given, *made, L, D, *strides, W=W, SILU=ctx.activation, **c)  # type: ignore[attr-defined]
        sums = parts.sum((0, 1))
        dw, dbias = sums[:W].flip(0).T.to(w.dtype), None if bias is None else sums[MOST_TAPS].to(bias.dtype)
        return dx, dw, dbias, dinitial, None, None


def step(x: Tensor, window: Tensor, w: Tensor, bias: Tensor | None, activation: bool, slots: Tensor | None) -> Tensor:
    """y (B, D) of one token; the rows of `window` (S, D, W) that `slots` names (all, in order, without) move on."""
    (B, D), block = x.shape, 256
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(B, D, dtype=x.dtype, device=x.device)
    tensors = (x, window, w.contiguous(), bias, slots, y)
    grid = (triton.cdiv(D, block), B)
    _step[grid](*tensors, D, x.stride(0), window.stride(0), W=w.shape[1], SILU=activation, BLOCK=block, num_warps=4)
    return y


def _even(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(initial: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if initial is None else initial.stride()


def _grid(x: Tensor, c: Config) -> tuple[int, int]:
    """Blocks of channels and stretches of time, neighbours in memory beside each other; and the batch."""
    B, L, D = x.shape
    return triton.cdiv(D, c["BLOCK"]) * triton.cdiv(L, c["SPAN"]), B


@triton.jit
def _tap(w_ptr, d, here, k: tl.constexpr, W: tl.constexpr):
    """w_k, the tap that meets the input k tokens ago; zero beyond the filter."""
    tap = tl.zeros(d.shape, tl.float32)
    if k < W:
        tap = tl.load(w_ptr + d * W + (W - 1 - k), mask=here, other=0.0).to(tl.float32)
    return tap


@triton.jit
def _filter(w_ptr, bias_ptr, d, here, W: tl.constexpr):
    """The taps w_0 .. w_3 and the bias of each channel."""
    w0, w1 = _tap(w_ptr, d, here, 0, W), _tap(w_ptr, d, here, 1, W)
    w2, w3 = _tap(w_ptr, d, here, 2, W), _tap(w_ptr, d, here, 3, W)
    bias = tl.zeros(d.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=here, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, bias


@triton.jit
def _past(x_ptr, initial_ptr, t, d, D, x_l, i_d, i_w, W: tl.constexpr):
    """x_t in float32, from the window before the sequence where t is negative, zero before that."""
    x = tl.load(x_ptr + t * x_l + d, mask=d < tl.where(t >= 0, D, 0), other=0.0).to(tl.float32)
    if initial_ptr is not None:
        known = tl.where((t < 0) & (t > -W), D, 0)
        x += tl.load(initial_ptr + d * i_d + (W + t) * i_w, mask=d < known, other=0.0).to(tl.float32)
    return x


@triton.jit
def _history(x_ptr, initial_ptr, starts_ptr, t, d, D, x_l, i_d, i_w, W: tl.constexpr):
    """The three inputs before token t, the latest first: zero where a document began in between."""
    x1 = _past(x_ptr, initial_ptr, t - 1, d, D, x_l, i_d, i_w, W)
    x2 = _past(x_ptr, initial_ptr, t - 2, d, D, x_l, i_d, i_w, W)
    x3 = _past(x_ptr, initial_ptr, t - 3, d, D, x_l, i_d, i_w, W)
    if starts_ptr is not None:
        began = tl.load(starts_ptr + t - 1, mask=t >= 1, other=0)
        x2 = tl.where(began != 0, 0.0, x2)
        began |= tl.load(starts_ptr + t - 2, mask=t >= 2, other=0)
        x3 = tl.where(began != 0, 0.0, x3)
    return x1, x2, x3


@triton.jit
def _forward(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    starts_ptr,
    y_ptr,
    L,
    D,
    x_b,
    x_l,
    i_b,
    i_d,
    i_w,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    n_blocks = tl.cdiv(D, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // n_blocks * SPAN
    own = tl.minimum(SPAN, L - first)
    first = first.to(tl.int64)
    here = d < D
    x_ptr += b * x_b
    y_ptr += b * L * D
    if initial_ptr is not None:
        initial_ptr += b * i_b
    if starts_ptr is not None:
        starts_ptr += b * L
    w0, w1, w2, w3, bias = _filter(w_ptr, bias_ptr, d, here, W)
    x1, x2, x3 = _history(x_ptr, initial_ptr, starts_ptr, first, d, D, x_l, i_d, i_w, W)
    # what the past adds to this token and the next two: sums, since a loop that hands inputs on is not pipelined
    y0, y1, y2 = w1 * x1 + w2 * x2 + w3 * x3, w2 * x1 + w3 * x2, w3 * x1
    for i in tl.range(0, own, num_stages=STAGES):
        t = first + i
        x = tl.load(x_ptr + t * x_l + d, mask=here, other=0.0).to(tl.float32)
        if starts_ptr is not None:
            new = tl.load(starts_ptr + t) != 0
            y0, y1, y2 = tl.where(new, 0.0, y0), tl.where(new, 0.0, y1), tl.where(new, 0.0, y2)
        y = bias + y0 + w0 * x
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + t * D + d, y, mask=here)
        y0, y1, y2 = y1 + w1 * x, y2 + w2 * x, w3 * x


@triton.jit
def _keep(parts_ptr, dw0, dw1, dw2, dw3, dbias, d, D):
    """Write a program's part of the gradients of the taps and the bias."""
    here = d < D
    tl.store(parts_ptr + d, dw0, mask=here)
    tl.store(parts_ptr + D + d, dw1, mask=here)
    tl.store(parts_ptr + 2 * D + d, dw2, mask=here)
    tl.store(parts_ptr + 3 * D + d, dw3, mask=here)
    tl.store(parts_ptr + 4 * D + d, dbias, mask=here)


@triton.jit
def _backward(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    starts_ptr,
    dy_ptr,
    dx_ptr,
    dinitial_ptr,
    parts_ptr,
    L,
    D,
    x_b,
    x_l,
    dy_b,
    dy_l,
    i_b,
    i_d,
    i_w,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    n_blocks = tl.cdiv(D, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    span = tl.program_id(0) // n_blocks
    own = tl.minimum(SPAN, L - span * SPAN)
    first = (span * SPAN).to(tl.int64)
    here = d < D
    x_ptr += b * x_b
    dy_ptr += b * dy_b
    dx_ptr += b * L * D
    parts_ptr += (b * tl.cdiv(L, SPAN) + span) * 5 * D
    if initial_ptr is not None:
        initial_ptr += b * i_b
        dinitial_ptr += b * D * W
    if starts_ptr is not None:
        starts_ptr += b * L
    w0, w1, w2, w3, bias = _filter(w_ptr, bias_ptr, d, here, W)
    zero = tl.zeros((BLOCK,), tl.float32)
    x1, x2, x3 = _history(x_ptr, initial_ptr, starts_ptr, first, d, D, x_l, i_d, i_w, W)
    # dx of the last three tokens, unfinished; whether a document goes on from the last one and two tokens
    dx1, dx2, dx3, on1, on2 = zero, zero, zero, 1.0, 1.0
    dw0, dw1, dw2, dw3, dbias = zero, zero, zero, zero, zero
    for i in tl.range(0, own + 3, num_stages=STAGES):
        t = first + i
        inside = d < tl.where(t < L, D, 0)
        x0 = tl.load(x_ptr + t * x_l + d, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + t * dy_l + d, mask=inside, other=0.0).to(tl.float32)
        # never true: a loop that hands inputs on untouched is not pipelined
        new = t < 0
        if starts_ptr is not None:
            new = tl.load(starts_ptr + t, mask=t < L, other=0) != 0
        x1, x2, x3 = tl.where(new, 0.0, x1), tl.where(new, 0.0, x2), tl.where(new, 0.0, x3)
        if SILU:
            pre = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            gate = tl.sigmoid(pre)
            g *= gate * (1.0 + pre * (1.0 - gate))
        # tokens past the stretch are another program's, but finish our dx
        mine = tl.where(i < own, g, 0.0)
        dw0, dw1, dbias = dw0 + mine * x0, dw1 + mine * x1, dbias + mine
        dw2, dw3 = dw2 + mine * x2, dw3 + mine * x3
        g1, g2, g3 = g, g, g
        if starts_ptr is not None:
            on1, on2, on3 = tl.where(new, 0.0, 1.0), tl.where(new, 0.0, on1), tl.where(new, 0.0, on2)
            g1, g2, g3 = g * on1, g * on2, g * on3
        dx1, dx2, dx3 = dx1 + w1 * g1, dx2 + w2 * g2, dx3 + w3 * g3
        tl.store(dx_ptr + (t - 3) * D + d, dx3, mask=d < tl.where(i >= 3, D, 0))
        if initial_ptr is not None:
            known = tl.where((t < 3) & (t - 3 > -W), D, 0)
            tl.store(dinitial_ptr + d * W + (W + t - 3), dx3, mask=d < known)
        dx3, dx2, dx1 = dx2, dx1, w0 * g
        x3, x2, x1 = x2, x1, x0
    _keep(parts_ptr, dw0, dw1, dw2, dw3, dbias, d, D)


@triton.jit
def _step(
    x_ptr,
    window_ptr,
    w_ptr,
    bias_ptr,
    slots_ptr,
    y_ptr,
    D,
    x_b,
    window_b,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    here = d < D
    real = d < tl.where(slot >= 0, D, 0)
    window = window_ptr + slot * window_b + d * W
    new = tl.load(x_ptr + b * x_b + d, mask=here, other=0.0).to(window_ptr.dtype.element_ty)
    y = new.to(tl.float32) * tl.load(w_ptr + d * W + W - 1, mask=here, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        old = tl.load(window + j + 1, mask=real, other=0.0)
        y += old.to(tl.float32) * tl.load(w_ptr + d * W + j, mask=here, other=0.0).to(tl.float32)
        # no thread may overwrite what another has yet to read
        tl.debug_barrier()
        tl.store(window + j, old, mask=real)
    tl.debug_barrier()
    tl.store(window + W - 1, new, mask=real)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=here, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + b * D + d, tl.where(slot >= 0, y, 0.0), mask=here)
