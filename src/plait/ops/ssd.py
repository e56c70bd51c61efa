"""The state space of Mamba-2: a linear recurrence over time, as a scan in chunks and as a single step.

    dt_t = clamp(softplus(dt_t + dt_bias), limit)         0 at padding: time stands still there
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T           S_t = dt_t x_t B_t^T at a document's first token
    y_t  = S_t C_t + D x_t

Chunked (section 6 of the paper): inside a chunk of tokens the recurrence is one masked product, (L o C B^T) X with
L_ts = exp(sum of dt A over (s, t]); between chunks only the states S travel. See kernels/eager/ssd.py.

Shapes   B batch, L time, H heads, P head size, G groups (G divides H), N state size.
Numbers  dt, decays, states and sums in float32 (float64 for float64 inputs).
Source   Dao and Gu 2024, arXiv:2405.21060 sections 5 and 6, equations 16 to 20; dt as in section 7.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves, triton_serves

NO_LIMIT = (0.0, float("inf"))
CPU_CHUNK = 64


def discretize(dt: Tensor, dt_bias: Tensor | None, limit: tuple[float, float], mask: Tensor | None) -> Tensor:
    """Time steps from their raw projections.

    Args:
        dt: (B, L, H) or (B, H) raw.
        dt_bias: (H,) or None.
        limit: bounds of the time step, applied after softplus.
        mask: (B, L) bool or None, False where time must stand still.

    Returns: dt's shape, float32 (float64 for float64), zero where mask is False.
    """
    dtype = torch.promote_types(dt.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = F.softplus(dt)
    if tuple(limit) != NO_LIMIT:
        dt = dt.clamp(*limit)
    return dt if mask is None else dt * mask[..., None]


@Op
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a whole sequence. This body is the definition: one token at a time.

    Args:
        x: (B, L, H, P) inputs, any float dtype.
        dt: (B, L, H) raw time steps.
        A: (H,) negative decay rates, float32.
        B, C: (B, L, G, N) input and output maps; head h uses group h // (H / G).
        D: (H,) skip weights or None.
        dt_bias: (H,) added to dt before softplus, or None.
        dt_limit: bounds of the time step after softplus.
        initial_state: (B, H, P, N) state before the first token, None is zero.
        starts: (B, L) bool, True at the first token of a document: the state before it is forgotten.
        mask: (B, L) bool, False at padding: the state passes it unchanged (outputs there mean nothing).
        chunk: tokens per chunk of the chunked backends; changes speed, not results.

    Returns: y (B, L, H, P) in x.dtype, and the final state (B, H, P, N) in float32 (float64 for float64).
    Raises: ValueError if G does not divide H.
    """
    _check(x, B)
    dt_BLH = discretize(dt, dt_bias, dt_limit, mask)
    repeats = x.shape[2] // B.shape[2]
    x_f, B_f, C_f = (t.to(dt_BLH.dtype) for t in (x, B, C))
    B_f, C_f = B_f.repeat_interleave(repeats, 2), C_f.repeat_interleave(repeats, 2)  # (B, L, H, N)
    shape = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    S = dt_BLH.new_zeros(shape) if initial_state is None else initial_state.to(dt_BLH.dtype)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            S = torch.where(starts[:, t, None, None, None], 0.0, S)
        decay = (dt_BLH[:, t] * A).exp()  # (B, H)
        dx = dt_BLH[:, t, :, None] * x_f[:, t]  # (B, H, P)
        S = decay[..., None, None] * S + dx[..., None] * B_f[:, t, :, None]
        ys.append((S * C_f[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D[:, None] * x_f).to(x.dtype), S


def _triton_takes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> bool:
    low = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [x, dt, A, B, C, *(t for t in rest.values() if isinstance(t, Tensor))]
    return x.numel() > 0 and all(t.dtype in low for t in tensors[:5]) and triton_serves(*tensors)


@ssd.backend("triton", when=_triton_takes)
def _triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.triton.ssd import Scan

    _check(x, B)
    return Scan.apply(x, dt, A, B, C, D, dt_bias, initial_state, starts, mask, *dt_limit, chunk)


def _native_takes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> bool:
    others = (rest.get(name) for name in ("D", "dt_bias", "initial_state"))
    tensors = [x, dt, A, B, C, *(t for t in others if isinstance(t, Tensor))]
    served = x.numel() > 0 and B.numel() > 0 and x.dtype == B.dtype == C.dtype and native_serves("ssd", *tensors)
    return served and _agree(x, dt, A, B, C, **rest)


def _agree(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> bool:
    """Whether all shapes are as `ssd` or `selective_state_update` says: a kernel does not look again."""
    before, (H, P), N = x.shape[:-2], x.shape[-2:], B.shape[-1]
    shapes = {"D": (H,), "dt_bias": (H,), "initial_state": (len(x), H, P, N), "starts": before, "mask": before}
    maps = B.shape == C.shape and B.shape[:-2] == before
    others = (t.shape == shapes[name] for name, t in rest.items() if isinstance(t, Tensor))
    return maps and dt.shape == x.shape[:-1] and A.shape == (H,) and all(others)


@ssd.backend("native", when=_native_takes)
def _native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 128,  # the kernel has its own, fit for the cache
) -> tuple[Tensor, Tensor]:
    from plait.kernels.native.ssd import scan

    _check(x, B)
    D, dt_bias, S = (None if t is None else t.float() for t in (D, dt_bias, initial_state))
    return scan(x, dt, A.float(), B, C, D, dt_bias, S, dt_limit, starts, mask)


@ssd.backend("chunked", when=lambda *args, **kwargs: True)
def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    from plait.kernels.eager.ssd import ChunkedScan

    _check(x, B)
    dt_BLH = discretize(dt, dt_bias, dt_limit, mask)
    S = None if initial_state is None else initial_state.to(dt_BLH.dtype)
    if x.is_cpu:
        # the (q, q) products of longer chunks cost more than the states they save
        chunk = min(chunk, CPU_CHUNK)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt_BLH, A, B, C, D, S))
    return ChunkedScan.apply(x, dt_BLH, dt_BLH * A, B, C, D, S, starts, chunk, keeps)


@Op
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
    rounding_seed: int | Tensor | None = None,
) -> Tensor:
    """One token of the recurrence; overwrites the state.

    Args:
        state: (B, H, P, N) float32, float16 or bfloat16, becomes the state after this token.
        x: (B, H, P); dt: (B, H) raw; A: (H,); B, C: (B, G, N); D, dt_bias: (H,) or None.
        dt_limit: bounds of the time step after softplus.
        slots: (B,) int64, which row of a larger pool (S, H, P, N) of states belongs to each input, no row twice; a
            negative one belongs to none: nothing is written and y is zero there. None when state's rows are x's.
        rounding_seed: round a half state stochastically, so that small updates survive on average; another seed at
            every token and layer. A (1,) int64 tensor on the state's device is read there, as a captured graph needs.
            None rounds to nearest.

    Returns: y (B, H, P) in x.dtype, formed before the state is rounded.
    Raises: ValueError if G does not divide H.
    """
    _check(x, B)
    if slots is not None:
        real = slots >= 0
        y, rows = x.new_zeros(x.shape), state[slots[real]]
        rest = {"D": D, "dt_bias": dt_bias, "dt_limit": dt_limit, "rounding_seed": rounding_seed}
        y[real] = selective_state_update.reference(rows, x[real], dt[real], A, B[real], C[real], **rest)
        state[slots[real]] = rows
        return y
    repeats = x.shape[-2] // B.shape[-2]
    dt_BH = discretize(dt, dt_bias, dt_limit, None)
    x_f = x.to(dt_BH.dtype)
    B_f, C_f = (t.to(dt_BH.dtype).repeat_interleave(repeats, 1) for t in (B, C))  # (B, H, N)
    decay = (dt_BH * A).exp()[..., None, None]
    added = (dt_BH[..., None] * x_f)[..., None] * B_f[:, :, None]  # (B, H, P, N)
    # the state itself where it is wide enough, and a wider copy of a half one
    wide = state.to(torch.promote_types(state.dtype, dt_BH.dtype)).mul_(decay).add_(added)
    y = torch.einsum("bhpn,bhn->bhp", wide.to(dt_BH.dtype), C_f)
    if wide is not state:
        state.copy_(wide if rounding_seed is None else _round(wide, state.dtype, int(rounding_seed)))
    return (y if D is None else y + D[:, None] * x_f).to(x.dtype)


def _round(t: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Each number to one of its two neighbours in a half format, the nearer the likelier: the mean stays."""
    format = torch.finfo(dtype)
    binade = torch.ldexp(torch.ones_like(t), t.frexp().exponent - 1)
    # below the normal numbers the spacing no longer shrinks; bfloat16's least would vanish in float32
    spacing = (binade * format.eps).clamp(min=max(format.smallest_normal * format.eps, 2.0**-126))
    u = torch.rand(t.shape, generator=torch.Generator(t.device).manual_seed(seed), device=t.device, dtype=t.dtype)
    return torch.floor(t / spacing + u) * spacing


def _step_fits_triton(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> bool:
    tensors = [state, x, dt, A, B, C, *(t for t in rest.values() if isinstance(t, Tensor))]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dense = len(state) == 0 or state[0].is_contiguous()
    wide = torch.float64 in (state.dtype, x.dtype)
    return dense and not trained and not wide and x.shape[1] % B.shape[1] == 0 and triton_serves(*tensors)


@selective_state_update.backend("triton", when=_step_fits_triton)
def _step_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
    rounding_seed: int | Tensor | None = None,
) -> Tensor:
    from plait.kernels.triton import step

    return step.selective_state_update(state, x, dt, A, B, C, D, dt_bias, dt_limit, slots, rounding_seed)


def _step_fits_native(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: object) -> bool:
    if rest.get("slots") is not None or rest.get("rounding_seed") is not None or torch.is_grad_enabled():
        return False
    tensors = [state, x, dt, A, B, C, *(t for t in rest.values() if isinstance(t, Tensor))]
    dense = state.is_contiguous() and all(t.is_contiguous() for t in tensors if t.dim() == 1)
    agree = state.shape == (*x.shape, B.shape[-1]) and _agree(x, dt, A, B, C, **rest)
    return agree and dense and len(x) > 0 and x.shape[1] % B.shape[1] == 0 and native_serves("decode", *tensors)


@selective_state_update.backend("native", when=_step_fits_native)
def _step_native(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    slots: Tensor | None = None,
    rounding_seed: int | Tensor | None = None,
) -> Tensor:
    from plait.kernels.native.decode import state_step

    return state_step(state, x, dt, A, B, C, D, dt_bias, dt_limit)


def _check(x: Tensor, B: Tensor) -> None:
    if x.shape[-2] % B.shape[-2]:
        raise ValueError(f"{B.shape[-2]} groups do not divide {x.shape[-2]} heads; n_groups must divide n_heads")
