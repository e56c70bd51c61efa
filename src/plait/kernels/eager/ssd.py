"""The Mamba-2 scan, chunk by chunk, so that everything of a chunk stays in the processor's cache.

With a_i the log decay since the chunk began and dx = dt x, a chunk of q tokens computes

    W_ij = exp(a_i - a_j) (C_i . B_j)                         j <= i, same document
    y_i  = sum_j W_ij dx_j  +  exp(a_i) S C_i                 S: state before the chunk
    S'   = exp(a_q) S  +  sum_j exp(a_q - a_j) dx_j B_j^T

The backward pass walks the chunks in reverse and forms W again instead of storing it. The gradient of a_i is what row i
of dW * W sums to, less what column i sums to: both from one matrix, so that they cancel exactly.

Shapes   b batch, L time, H heads, P head size, G groups, R = H / G, N state size, q tokens of the chunk at hand.
Numbers  everything in float32 (float64 for float64), inputs and outputs in x.dtype.
Source   Dao and Gu 2024, arXiv:2405.21060 section 6, Listing 1.
"""

import torch
from torch import Tensor


class ChunkedScan(torch.autograd.Function):
    """y, last state = apply(x, dt, a, B, C, D, S, starts, chunk, keeps); dt and a = dt A are (b, L, H) in float32.

    keeps: whether a backward pass will come, which needs the state before every chunk.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        S: Tensor | None,
        starts: Tensor | None,
        chunk: int,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        forward = _traced_forward if torch.compiler.is_compiling() else _forward
        y, states = forward(x, dt, a, B, C, D, S, starts, chunk, keeps)
        ctx.save_for_backward(x, dt, a, B, C, D, starts, states)  # type: ignore[arg-type]
        ctx.chunk = chunk  # type: ignore[attr-defined]
        return y, states[-1].clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, a, B, C, D, starts, states = ctx.saved_tensors  # type: ignore[attr-defined]
        backward = _traced_backward if torch.compiler.is_compiling() else _backward
        *grads, dD, dS = backward(dy, dS, x, dt, a, B, C, D, starts, states, ctx.chunk)  # type: ignore[attr-defined]
        grad_S = dS if ctx.needs_input_grad[6] else None  # type: ignore[attr-defined]
        return *grads, None if D is None else dD, grad_S, None, None, None


def _forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    S: Tensor | None,
    starts: Tensor | None,
    chunk: int,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the state before each chunk and after the last (only that one if not `keeps`)."""
    b, L, H, P = x.shape
    S = dt.new_zeros(b, H, P, B.shape[3]) if S is None else S
    states = dt.new_empty(-(-L // chunk) + 1 if keeps else 1, *S.shape)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for first in range(0, L, chunk):
        part = slice(first, min(first + chunk, L))
        if keeps:
            states[first // chunk] = S
        c = _Chunk(x, dt, a, B, C, starts, part)
        out = (c.weights() @ c.dx).addcmul_(c.carried(S), c.from_begin[..., None])
        S = c.state_after(S)
        out = out.transpose(1, 2)
        y[:, part] = out if D is None else out.add_(x[:, part] * D[:, None])
    states[-1] = S
    return y, states


def _backward(
    dy: Tensor,
    dS: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, B, C, D (empty without D) and of the state before the sequence."""
    grad_x, grad_B, grad_C = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
    grad_dt, grad_a = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dt, a))
    grad_D = dt.new_zeros(0 if D is None else D.shape[0])
    for first in reversed(range(0, x.shape[1], chunk)):
        part, index = slice(first, min(first + chunk, x.shape[1])), first // chunk
        c = _Chunk(x, dt, a, B, C, starts, part)
        g = dy[:, part].transpose(1, 2).to(dt.dtype).contiguous()  # (b, H, q, P)
        ddx, dB, dC, da, dS = c.gradients(g, dS, states[index], states[index + 1])
        grad_B[:, part], grad_C[:, part] = dB.transpose(1, 2), dC.transpose(1, 2)
        # a is a running sum inside the chunk: its terms collect what comes after them
        grad_a[:, part] = da.flip(-1).cumsum(-1).flip(-1).transpose(1, 2)
        xq = x[:, part].transpose(1, 2).to(dt.dtype)
        grad_dt[:, part] = (ddx * xq).sum(-1).transpose(1, 2)
        ddx *= c.dt[..., None]
        if D is not None:
            ddx.addcmul_(g, D[:, None, None])
            grad_D += (g * xq).sum((0, 2, 3))
        grad_x[:, part] = ddx.transpose(1, 2)
    return grad_x, grad_dt, grad_a, grad_B, grad_C, grad_D, dS


# a compiler would unroll the loops over chunks and compile anew for every length: to it, each pass is one node
_traced_forward = torch.library.custom_op("plait::chunked_scan", _forward, mutates_args=())
_traced_backward = torch.library.custom_op("plait::chunked_scan_backward", _backward, mutates_args=())


@_traced_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    S: Tensor | None,
    starts: Tensor | None,
    chunk: int,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    b, L, H, P = x.shape
    states = dt.new_empty(-(-L // chunk) + 1 if keeps else 1, b, H, P, B.shape[3])
    return torch.empty_like(x, memory_format=torch.contiguous_format), states


@_traced_backward.register_fake
def _(
    dy: Tensor,
    dS: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, a, B, C))
    return *grads, dt.new_empty(0 if D is None else D.shape[0]), states.new_empty(states.shape[1:])


class _Chunk:
    """The quantities of one chunk that both passes need."""

    def __init__(
        self, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, part: slice
    ) -> None:
        f32 = dt.dtype
        self.G, self.R = B.shape[2], x.shape[2] // B.shape[2]
        self.dt = dt[:, part].transpose(1, 2)  # (b, H, q)
        self.dx = torch.mul(x[:, part].transpose(1, 2), self.dt[..., None]).contiguous()  # (b, H, q, P)
        self.B, self.C = (t[:, part].transpose(1, 2).to(f32).contiguous() for t in (B, C))  # (b, G, q, N)
        self.a = a[:, part].transpose(1, 2).cumsum(-1)  # (b, H, q)
        self.from_begin, self.to_end = self.a.exp(), (self.a[..., -1:] - self.a).exp()
        q = self.a.shape[-1]
        hidden = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
        if starts is not None:
            # how many documents have begun so far: tokens with equal counts share a document
            begun = starts[:, part].long().cumsum(-1)
            hidden = (hidden | (begun[:, :, None] != begun[:, None, :]))[:, None]
            self.from_begin = self.from_begin * (begun == 0)[:, None]
            self.to_end = self.to_end * (begun == begun[:, -1:])[:, None]
        self.hidden = hidden

    def decay(self) -> Tensor:
        """exp(a_i - a_j) where token i sees token j, else zero: (b, H, q, q)."""
        # above the diagonal the exponent is positive and would overflow; below -80 exp is slow and its value nothing
        log = self.a[..., :, None] - self.a[..., None, :]
        return log.clamp_(-80.0, 0.0).exp_().masked_fill_(self.hidden, 0.0)

    def weights(self) -> Tensor:
        """W (b, H, q, q)."""
        scores = self.C @ self.B.transpose(-1, -2)  # (b, G, q, q)
        return self._grouped(self.decay()).mul_(scores[:, :, None]).flatten(1, 2)

    def carried(self, S: Tensor) -> Tensor:
        """S C_i for the state before the chunk: (b, H, q, P)."""
        return self._heads(self.C @ self._rows(S).transpose(-1, -2))

    def state_after(self, S: Tensor) -> Tensor:
        """(b, H, P, N)."""
        ended = self._columns(self.dx * self.to_end[..., None])  # (b, G, q, R P)
        added = (ended.transpose(-1, -2) @ self.B).view(S.shape)
        return added.addcmul_(S, self.from_begin[..., -1, None, None])

    def gradients(self, g: Tensor, dS: Tensor, S: Tensor, S_after: Tensor) -> tuple[Tensor, ...]:
        """From dy (b, H, q, P) and the gradient of the state after: those of dx, B, C, a and the state before."""
        decay = self.decay()
        scores = self.C @ self.B.transpose(-1, -2)
        W = (self._grouped(decay) * scores[:, :, None]).flatten(1, 2)
        dW = g @ self.dx.transpose(-1, -2)
        ddx = W.transpose(-1, -2) @ g
        W.mul_(dW)
        da = W.sum(-1) - W.sum(-2)
        dscores = self._grouped(decay.mul_(dW)).sum(2)  # (b, G, q, q)
        dC, dB = dscores @ self.B, dscores.transpose(-1, -2) @ self.C

        g_begin = g * self.from_begin[..., None]
        da += (g_begin * self.carried(S)).sum(-1)
        columns = self._columns(g_begin)
        dC += columns @ self._rows(S)
        dS_before = (columns.transpose(-1, -2) @ self.C).view(S.shape)

        ended = self._heads(self.B @ self._rows(dS).transpose(-1, -2)).mul(self.to_end[..., None])
        da -= (ended * self.dx).sum(-1)
        da[..., -1] += (dS * S_after).sum((-1, -2))
        dB += self._columns(self.dx * self.to_end[..., None]) @ self._rows(dS)
        dS_before.addcmul_(dS, self.from_begin[..., -1, None, None])
        return ddx.add_(ended), dB, dC, da, dS_before

    def _grouped(self, t: Tensor) -> Tensor:
        """(b, H, ...) to (b, G, R, ...)."""
        return t.unflatten(1, (self.G, self.R))

    def _rows(self, S: Tensor) -> Tensor:
        """(b, H, P, N) to (b, G, R P, N)."""
        return self._grouped(S).flatten(2, 3)

    def _columns(self, t: Tensor) -> Tensor:
        """(b, H, q, P) to (b, G, q, R P)."""
        return self._grouped(t).transpose(2, 3).flatten(3)

    def _heads(self, t: Tensor) -> Tensor:
        """(b, G, q, R P) to (b, H, q, P)."""
        return t.unflatten(3, (self.R, -1)).transpose(2, 3).flatten(1, 2)
