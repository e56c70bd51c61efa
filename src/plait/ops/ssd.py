"""The state space of Mamba-2: a linear recurrence over time, as a scan in chunks and as a single step.

    dt_t = clamp(softplus(dt_t + dt_bias), limit)         0 at padding: time stands still there
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T           S_t = dt_t x_t B_t^T at a document's first token
    y_t  = S_t C_t + D x_t

Chunked (section 6 of the paper): inside a chunk of Q tokens the recurrence is one masked product, (L o C B^T) X with
L_ts = exp(sum of dt A over (s, t]); between chunks only the states S travel. All of it is matrix products but for one
elementwise pass over L and a loop over chunks that touches states alone.

Shapes   B batch, L time, H heads, P head size, G groups (G divides H), N state size, C chunks, Q chunk length, R = H / G.
Numbers  dt, decays and states in float32 (float64 for float64 inputs); the products inside a chunk in x.dtype.
Source   Dao and Gu 2024, arXiv:2405.21060 sections 5 and 6, equations 16 to 20; dt as in section 7.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op

NO_LIMIT = (0.0, float("inf"))


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
    _check(x, B)
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    R, Q = H // G, min(chunk, L)
    n_chunks = -(-L // Q)
    dt_BLH = discretize(dt, dt_bias, dt_limit, mask)
    f32 = dt_BLH.dtype

    def chunks(t: Tensor) -> Tensor:
        """(B, L, ...) to (B, C, Q, ...); the tail is padded with dt = 0, so time stands still there."""
        pad = n_chunks * Q - L
        if pad:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
        return t.unflatten(1, (n_chunks, Q))

    dt_BCQH = chunks(dt_BLH)
    a_BCHQ = (dt_BCQH * A.to(f32)).transpose(2, 3).cumsum(-1)  # log decay since the chunk began
    dx_BCQHP = chunks(x) * dt_BCQH[..., None].to(x.dtype)
    B_BCGQN, C_BCGQN = chunks(B).transpose(2, 3), chunks(C).transpose(2, 3)
    # how many documents have begun in this chunk so far: tokens with equal counts share a document
    begun_BCQ = None if starts is None else chunks(starts.long()).cumsum(-1)

    # 1. inside a chunk: Y = (L o C B^T) X, one attention-like product per head
    seen_BCQQ = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    if begun_BCQ is not None:
        seen_BCQQ = (seen_BCQQ & (begun_BCQ[..., :, None] == begun_BCQ[..., None, :]))[:, :, None]
    log_BCHQQ = a_BCHQ[..., :, None] - a_BCHQ[..., None, :]
    # masked before exp: above the diagonal the exponent is positive and may overflow
    decay_BCHQQ = log_BCHQQ.masked_fill(~seen_BCQQ, -torch.inf).exp()
    scores_BCGQQ = C_BCGQN @ B_BCGQN.transpose(-1, -2)
    weights = (scores_BCGQQ[:, :, :, None] * decay_BCHQQ.unflatten(2, (G, R))).flatten(2, 3).to(x.dtype)
    y_BCHQP = weights @ dx_BCQHP.transpose(2, 3)

    # 2. what each chunk adds to the state by its end: S = sum_s exp(a_Q - a_s) dt_s x_s B_s^T
    to_end_BCHQ = (a_BCHQ[..., -1:] - a_BCHQ).exp()
    from_begin_BCHQ = a_BCHQ.exp()
    if begun_BCQ is not None:
        to_end_BCHQ = to_end_BCHQ * (begun_BCQ == begun_BCQ[..., -1:])[:, :, None]
        from_begin_BCHQ = from_begin_BCHQ * (begun_BCQ == 0)[:, :, None]
    ended_BCQHP = dx_BCQHP * to_end_BCHQ.transpose(2, 3)[..., None]  # float32
    grouped = ended_BCQHP.unflatten(3, (G, R)).permute(0, 1, 3, 4, 5, 2).flatten(3, 4)  # (B, C, G, R P, Q)
    added_BCHPN = (grouped @ B_BCGQN.to(f32)).unflatten(3, (R, P)).flatten(2, 3)

    # 3. carry the state from chunk to chunk
    kept_BCH = from_begin_BCHQ[..., -1]
    S = added_BCHPN.new_zeros(b, H, P, N) if initial_state is None else initial_state.to(f32)
    befores = []
    for c in range(n_chunks):
        befores.append(S)
        S = torch.addcmul(added_BCHPN[:, c], S, kept_BCH[:, c, :, None, None])
    before_BCHPN = torch.stack(befores, 1)

    # 4. what the state from before the chunk gives to each of its tokens: C_t S exp(a_t)
    before = before_BCHPN.unflatten(2, (G, R)).flatten(3, 4).to(x.dtype)  # (B, C, G, R P, N)
    carried = (C_BCGQN @ before.transpose(-1, -2)).unflatten(-1, (R, P))  # (B, C, G, Q, R, P)
    carried_BCHQP = carried.transpose(3, 4).flatten(2, 3) * from_begin_BCHQ[..., None]
    y = (y_BCHQP + carried_BCHQP).transpose(2, 3).flatten(1, 2)[:, :L]
    return (y if D is None else y + D.to(f32)[:, None] * x).to(x.dtype), S


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
) -> Tensor:
    """One token of the recurrence; overwrites the state.

    Args:
        state: (B, H, P, N) float32, becomes the state after this token.
        x: (B, H, P); dt: (B, H) raw; A: (H,); B, C: (B, G, N); D, dt_bias: (H,) or None.
        dt_limit: bounds of the time step after softplus.

    Returns: y (B, H, P) in x.dtype.
    Raises: ValueError if G does not divide H.
    """
    _check(x, B)
    repeats = x.shape[-2] // B.shape[-2]
    dt_BH = discretize(dt, dt_bias, dt_limit, None)
    x_f = x.to(dt_BH.dtype)
    B_f, C_f = (t.to(dt_BH.dtype).repeat_interleave(repeats, 1) for t in (B, C))  # (B, H, N)
    decay = (dt_BH * A).exp()[..., None, None]
    added = (dt_BH[..., None] * x_f)[..., None] * B_f[:, :, None]  # (B, H, P, N)
    state.mul_(decay).add_(added)
    y = torch.einsum("bhpn,bhn->bhp", state.to(dt_BH.dtype), C_f)
    return (y if D is None else y + D[:, None] * x_f).to(x.dtype)


def _check(x: Tensor, B: Tensor) -> None:
    if x.shape[-2] % B.shape[-2]:
        raise ValueError(f"{B.shape[-2]} groups do not divide {x.shape[-2]} heads; n_groups must divide n_heads")
