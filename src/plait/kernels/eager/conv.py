"""Causal depthwise convolution with SiLU: one multiply-add per tap, over blocks of time that stay in cache.

Shapes   B batch, L time, D channels, W taps.
Numbers  float32 inside (float64 for float64); the value before SiLU is formed again in the backward pass.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# numbers of a block: 1 MiB in float32
BLOCK = 1 << 18


class CausalConv(torch.autograd.Function):
    """y = apply(padded, w, bias, starts, activation); padded (B, W - 1 + L, D) begins with the inputs before."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        padded: Tensor,
        w: Tensor,
        bias: Tensor | None,
        starts: Tensor | None,
        activation: bool,
    ) -> Tensor:
        ctx.save_for_backward(padded, w, bias, starts)  # type: ignore[arg-type]
        ctx.activation = activation  # type: ignore[attr-defined]
        forward = _traced_forward if torch.compiler.is_compiling() else _forward
        return forward(padded, w, bias, starts, activation)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        padded, w, bias, starts = ctx.saved_tensors  # type: ignore[attr-defined]
        backward = _traced_backward if torch.compiler.is_compiling() else _backward
        dp, dw, dbias = backward(dy, padded, w, bias, starts, ctx.activation)  # type: ignore[attr-defined]
        return dp, dw, None if bias is None else dbias.to(bias.dtype), None, None


def _forward(padded: Tensor, w: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool) -> Tensor:
    B, L, D = padded.shape[0], padded.shape[1] - w.shape[1] + 1, padded.shape[2]
    y, same = padded.new_empty(B, L, D), _same_document(starts, w.shape[1])
    for part, p in _blocks(padded, w.shape[1]):
        pre = _convolve(p, w, bias, same, part)
        y[:, part] = F.silu(pre, inplace=True) if activation else pre
    return y


def _backward(
    dy: Tensor, padded: Tensor, w: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of padded, w, and a bias (in float32)."""
    W, f32 = w.shape[1], torch.promote_types(padded.dtype, torch.float32)
    taps, same = w.to(f32).unbind(1), _same_document(starts, W)
    dp = torch.zeros(padded.shape, dtype=f32, device=padded.device)
    dw, dbias = torch.zeros(W, w.shape[0], dtype=f32, device=w.device), torch.zeros_like(taps[0])
    for part, p in _blocks(padded, W):
        g, n = dy[:, part].to(f32), part.stop - part.start
        if activation:
            g = torch.ops.aten.silu_backward(g, _convolve(p, w, bias, same, part))
        dbias += g.sum((0, 1))
        for j in range(W):
            gj = g if same is None or j == W - 1 else torch.where(same[j][:, part], g, 0.0)
            dp[:, part.start + j : part.stop + j].addcmul_(gj, taps[j])
            dw[j] += (gj * p[:, j : j + n]).sum((0, 1))
    return dp.to(padded.dtype), dw.T.to(w.dtype).contiguous(), dbias


# a compiler would unroll the loops over blocks and compile anew for every length: to it, each pass is one node
_traced_forward = torch.library.custom_op("plait::conv", _forward, mutates_args=())
_traced_backward = torch.library.custom_op("plait::conv_backward", _backward, mutates_args=())


@_traced_forward.register_fake
def _(padded: Tensor, w: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool) -> Tensor:
    return padded.new_empty(padded.shape[0], padded.shape[1] - w.shape[1] + 1, padded.shape[2])


@_traced_backward.register_fake
def _(
    dy: Tensor, padded: Tensor, w: Tensor, bias: Tensor | None, starts: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    f32 = torch.promote_types(padded.dtype, torch.float32)
    return padded.new_empty(padded.shape), w.new_empty(w.shape), w.new_empty(w.shape[0], dtype=f32)


def _blocks(padded: Tensor, W: int) -> Iterator[tuple[slice, Tensor]]:
    """Parts of time, and the inputs (B, W - 1 + part, D) in float32 that each needs."""
    L, f32 = padded.shape[1] - W + 1, torch.promote_types(padded.dtype, torch.float32)
    size = max(BLOCK // (padded.shape[0] * padded.shape[2]), 16)
    parts = [slice(first, min(first + size, L)) for first in range(0, L, size)]
    return ((part, padded[:, part.start : part.stop + W - 1].to(f32)) for part in parts)


def _convolve(p: Tensor, w: Tensor, bias: Tensor | None, same: list[Tensor] | None, part: slice) -> Tensor:
    """The sums before SiLU, for one block."""
    W, n = w.shape[1], part.stop - part.start
    taps = w.to(p.dtype).unbind(1)
    y = p[:, W - 1 :] * taps[-1] if bias is None else torch.addcmul(bias.to(p.dtype), p[:, W - 1 :], taps[-1])
    for j in range(W - 1):
        past = p[:, j : j + n]
        y.addcmul_(past if same is None else torch.where(same[j][:, part], past, 0.0), taps[j])
    return y


def _same_document(starts: Tensor | None, W: int) -> list[Tensor] | None:
    """For each tap but the last: (B, L, 1) bool, whether the token it meets is in the current token's document."""
    if starts is None:
        return None
    document = F.pad(starts.long().cumsum(1), (W - 1, 0))
    L = starts.shape[1]
    return [(document[:, j : j + L] == document[:, W - 1 :])[..., None] for j in range(W - 1)]
