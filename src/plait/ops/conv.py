"""Short causal convolution over time, one filter per channel: the first step of a Mamba-2 mixer.

    y_t = act( bias + sum_j w_j * x_{t - (W - 1) + j} ),   j = 0 .. W-1

Inputs before the sequence come from `initial` (zeros without it); inputs of an earlier document count as zero.

Shapes   B batch, L time, D channels, W taps (the last tap meets the current token).
Numbers  products and sums in x.dtype for float32 and float64, in float32 for the half formats; result in x.dtype.
Source   Dao and Gu 2024, arXiv:2405.21060 section 7.1; the state's layout is that of public checkpoints' caches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves, triton_serves


@Op
def causal_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    """Convolve each channel with its own W taps over the past, then apply SiLU.

    Args:
        x: (B, L, D) inputs, any float dtype.
        w: (D, W) taps, oldest first.
        bias: (D,) or None.
        initial: (B, D, W) the last W inputs before this call, oldest first (the oldest is not needed); None is zeros.
        starts: (B, L) bool, True at the first token of a document: what came before counts as zero.
        activation: apply SiLU at the end.

    Returns: (B, L, D) in x.dtype.
    """
    L, W = x.shape[1], w.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = _with_past(x, W, initial)
    w = w.to(dtype)
    y = padded[:, W - 1 :].to(dtype) * w[:, W - 1]
    if bias is not None:
        y = y + bias.to(dtype)
    document = None if starts is None else F.pad(starts.long().cumsum(1), (W - 1, 0))  # (B, W - 1 + L)
    for j in range(W - 1):
        tap = w[:, j]
        if document is not None:
            same = document[:, j : j + L] == document[:, W - 1 :]
            y = y + torch.where(same[..., None], padded[:, j : j + L].to(dtype) * tap, 0.0)
        else:
            y = torch.addcmul(y, padded[:, j : j + L].to(dtype), tap)
    return (F.silu(y) if activation else y).to(x.dtype)


def _fits_triton(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> bool:
    # four taps is what the kernel keeps in registers
    return w.shape[1] <= 4 and x.dtype != torch.float64 and triton_serves(x, w, bias, initial, starts)


@causal_conv1d.backend("triton", when=_fits_triton)
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    from plait.kernels.triton.conv import CausalConv

    return CausalConv.apply(x, w, bias, initial, starts, activation)


def _fits_native(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> bool:
    from plait.kernels.native.conv import MOST_TAPS

    if x.stride(2) != 1 or w.shape[1] > MOST_TAPS or not native_serves("conv", x, w, bias, initial):
        return False
    (B, L, D), taps = x.shape, w.shape[1]
    shapes = ((w, (D, taps)), (bias, (D,)), (initial, (B, D, taps)), (starts, (B, L)))
    return all(t is None or t.shape == shape for t, shape in shapes)


@causal_conv1d.backend("native", when=_fits_native)
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    from plait.kernels.native.conv import CausalConv

    # one tap needs no past
    past = None if initial is None or w.shape[1] == 1 else initial[:, :, 1:].transpose(1, 2).to(x.dtype).contiguous()
    starts = None if starts is None else starts.bool().contiguous()
    return CausalConv.apply(x, past, w, bias, starts, activation)


@causal_conv1d.backend("eager", when=lambda *args, **kwargs: True)
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    starts: Tensor | None = None,
    activation: bool = True,
) -> Tensor:
    from plait.kernels.eager.conv import CausalConv

    return CausalConv.apply(_with_past(x, w.shape[1], initial), w, bias, starts, activation)


@Op
def causal_conv1d_step(
    x: Tensor,
    window: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of the convolution; shifts the window in place.

    Args:
        x: (B, D) the new input.
        window: (B, D, W) the last W inputs, oldest first; overwritten with the window that ends in x.
        w: (D, W) taps, oldest first.
        bias: (D,) or None.
        activation: apply SiLU at the end.
        slots: (B,) int64, which row of a larger pool (S, D, W) of windows belongs to each input, no row twice; a
            negative one belongs to none: nothing is written and y is zero there. None when window's rows are x's.

    Returns: (B, D) in x.dtype.
    """
    if slots is not None:
        real = slots >= 0
        y, rows = x.new_zeros(x.shape), window[slots[real]]
        y[real] = causal_conv1d_step.reference(x[real], rows, w, bias, activation=activation)
        window[slots[real]] = rows
        return y
    window.copy_(torch.cat([window[:, :, 1:], x[:, :, None].to(window.dtype)], dim=-1))
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(dtype) * w.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation else y).to(x.dtype)


def _step_fits_triton(
    x: Tensor,
    window: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    slots: Tensor | None = None,
) -> bool:
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, window, w, bias))
    dense = window.stride()[1:] == (window.shape[2], 1)
    return dense and not trained and x.dtype != torch.float64 and triton_serves(x, window, w, bias, slots)


@causal_conv1d_step.backend("triton", when=_step_fits_triton)
def _(
    x: Tensor,
    window: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    from plait.kernels.triton.conv import step

    return step(x, window, w, bias, activation, slots)


def _step_fits_native(
    x: Tensor,
    window: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    slots: Tensor | None = None,
) -> bool:
    if slots is not None or torch.is_grad_enabled() or x.dtype == torch.float64 or not native_serves("decode", x):
        return False
    kept = [t for t in (window, w, bias) if t is not None]
    (B, D), taps = x.shape, w.shape[1]
    agree = window.shape == (B, D, taps) and len(w) == D and (bias is None or len(bias) == D)
    return agree and all(t.is_contiguous() for t in kept) and native_serves("decode", *kept)


@causal_conv1d_step.backend("native", when=_step_fits_native)
def _(
    x: Tensor,
    window: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    from plait.kernels.native.decode import conv_step

    return conv_step(x, window, w, bias, activation)


def conv_window(x: Tensor, width: int, *, initial: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The last `width` inputs of each sequence: what the next call's `initial` must be.

    Args:
        x: (B, L, D) inputs of this call.
        width: W.
        initial: (B, D, W) the window before this call, None for zeros.
        mask: (B, L) bool, False at padding, which never enters the window.

    Returns: (B, D, W) in x.dtype, oldest first.
    """
    B, L, D = x.shape
    past = x.new_zeros(B, width, D) if initial is None else initial.transpose(1, 2).to(x.dtype)
    if mask is None:
        return torch.cat([past, x[:, -width:]], dim=1)[:, -width:].transpose(1, 2).contiguous()
    # the window ends at the last real token; a row of padding only keeps its old window
    steps = torch.arange(1, L + 1, device=x.device)
    end = (mask * steps).amax(1)  # (B,) one past the last real token, 0 if none
    index = end[:, None] + torch.arange(width, device=x.device)  # rows of [past; x]
    padded = torch.cat([past, x * mask[..., None]], dim=1)
    return padded.gather(1, index[..., None].expand(-1, -1, D)).transpose(1, 2).contiguous()


def _with_past(x: Tensor, W: int, initial: Tensor | None) -> Tensor:
    """(B, W - 1 + L, D): x behind the inputs that its first taps meet."""
    past = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if initial is None else initial[:, :, 1:].transpose(1, 2)
    return torch.cat([past.to(x.dtype), x], dim=1)
