"""One token of the state space on GPUs: each state is read once, moved on, and written once.

    dt = clamp(softplus(dt + dt_bias)),  S = exp(dt A) S + dt x B^T,  y = S C + D x

A and dt are one number per head, so a program loads them once for a whole tile of its head's state. States may be half
as wide as float32. Rounded to nearest, small updates would be lost for good; rounded stochastically (to one of the two
neighbours, the nearer the likelier) they survive on average: S becomes floor(S / q + u) q, with q the spacing of the
format at S and u uniform in [0, 1). Bits come from Philox with seven rounds, 16 for a number, so one call serves eight.

Shapes   B batch, S slots, H heads, P head size, G groups, N state size.
Bytes    2 B H P N numbers of state; everything else is less than a hundredth of it.
Numbers  float32 inside; y is formed before the state is rounded.
Source   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox, and how many rounds pass).
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["selective_state_update"] = {"BLOCK_P": 32, "num_warps": 4}
# dtype: bits of its fraction, the least exponent (as float32 writes it) with which a spacing can be written, bits kept
# of 16 random ones: as many as float32's fraction has beyond the format's, so that what is exact stays exact
_ROUNDING = {torch.float16: (10, 113, 0xFFF8), torch.bfloat16: (7, 8, 0xFFFF)}


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    slots: Tensor | None,
    rounding_seed: int | Tensor | None,
) -> Tensor:
    """y (B, H, P); overwrites the states (B or S, H, P, N), whose last three dimensions are dense."""
    (b, H, P), G, N = x.shape, B.shape[1], B.shape[2]
    x, B, C = (t if t[0].is_contiguous() else t.contiguous() for t in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    y = torch.empty(b, H, P, dtype=x.dtype, device=x.device)
    c = config("selective_state_update", batch=b, bytes=state.element_size())
    block_p = min(c["BLOCK_P"], triton.next_power_of_2(P))
    bits, least, kept = _ROUNDING.get(state.dtype, (0, 0, 0))
    seed = rounding_seed if isinstance(rounding_seed, Tensor) else (rounding_seed or 0) & 0x7FFFFFFF
    _update[(H * triton.cdiv(P, block_p), b)](
        *(state, x, dt, A, B, C, D, dt_bias, slots, seed, y),
        *(float(dt_limit[0]), float(dt_limit[1]), H, P, N, H // G),
        *(t.stride(0) for t in (state, x, dt, B, C)),
        SEEDED=rounding_seed is not None and bits > 0,
        SEED_ON_DEVICE=isinstance(rounding_seed, Tensor),
        BITS=bits,
        LEAST=least,
        KEPT=kept,
        BLOCK_P=block_p,
        BLOCK_N=max(16, triton.next_power_of_2(N)),
        num_warps=c["num_warps"],
    )
    return y


@triton.jit
def _softplus(x):
    """log(1 + e^x); the quotient undoes the rounding of 1 + e^x where e^x is small."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _round(
    S,
    seed,
    tile,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """S as float32 numbers that the half format holds exactly; `tile` numbers the tiles of one launch."""
    CALLS: tl.constexpr = BLOCK_N // 8
    call = tl.arange(0, BLOCK_P)[:, None] * CALLS + tl.arange(0, CALLS)[None, :]
    r0, r1, r2, r3 = tl.randint4x(seed, tile * (BLOCK_P * CALLS) + call, n_rounds=7)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    r = tl.join(words & 0xFFFF, words >> 16)
    r = tl.reshape(r, [BLOCK_P, BLOCK_N]).to(tl.int32)
    u = (((r & KEPT) << 7) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    exponent = tl.maximum(S.to(tl.int32, bitcast=True) & 0x7F800000, LEAST << 23)
    spacing = exponent - (BITS << 23)
    inverse = ((254 << 23) - spacing).to(tl.float32, bitcast=True)
    return tl.floor(S * inverse + u) * spacing.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def _update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    dt_bias_ptr,
    slots_ptr,
    seed,
    y_ptr,
    low,
    high,
    H,
    P,
    N,
    PER_GROUP,
    state_b,
    x_b,
    dt_b,
    B_b,
    C_b,
    SEEDED: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_blocks = tl.cdiv(P, BLOCK_P)
    h, b = tl.program_id(0) // n_blocks, tl.program_id(1).to(tl.int64)
    p, n = tl.program_id(0) % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    group = h // PER_GROUP
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    real = (p < tl.where(slot >= 0, P, 0))[:, None] & (n < N)[None, :]
    states = state_ptr + slot * state_b + h.to(tl.int64) * P * N + p[:, None] * N + n[None, :]
    S = tl.load(states, mask=real, other=0.0).to(tl.float32)

    dt = tl.load(dt_ptr + b * dt_b + h).to(tl.float32)
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + h).to(tl.float32)
    dt = tl.minimum(tl.maximum(_softplus(dt), low), high)
    x = tl.load(x_ptr + b * x_b + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_b + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    S = S * tl.exp(dt * tl.load(A_ptr + h).to(tl.float32)) + (dt * x)[:, None] * B[None, :]
    y = tl.sum(S * C[None, :], axis=1)
    if D_ptr is not None:
        y += tl.load(D_ptr + h).to(tl.float32) * x
    tl.store(y_ptr + (b * H + h) * P + p, tl.where(slot >= 0, y, 0.0), mask=p < P)
    if SEEDED:
        if SEED_ON_DEVICE:
            seed = tl.load(seed)
        S = _round(S, seed, b * tl.num_programs(0) + tl.program_id(0), BITS, LEAST, KEPT, BLOCK_P, BLOCK_N)
    tl.store(states, S, mask=real)
