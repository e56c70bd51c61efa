"""A linear layer as three products, each operand in its own format, keeping only codes for the backward pass.

    y = x W^T          dx = dy W          dW = dy^T x

Weights are rounded anew in the backward pass, from the same masters; of the input only what the weight gradient needs
is kept: its codes and scales, 1 byte a number in FP8 and 9/16 in NVFP4, where bfloat16 keeps 2 (and 2 for each
weight). Projections of one input (q, k and v; up and gate) share its codes.

Shapes   x (..., K), w (N, K), y (..., N); T tokens are summed over in the weight gradient, padded with zeros to whole
         blocks.
Numbers  products in x.dtype with float32 sums; gradients of weights in w.dtype.
Source   NVIDIA 2025, arXiv:2509.25149 figure 5; arXiv:2504.03624 section 2.4.
"""

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.ops.random import stream
from plait.precision.figures import Watch, tell
from plait.precision.format import LinearFormat, TensorFormat
from plait.precision.operand import Operand, is_native, pad_rows, product, round_to


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of a layer needs to know besides its tensors.

    name: of the layer, for the streams of random numbers. seed, draw, part: see Moment. parts: rows of the weight's
    segments. n_high: trailing rows that are not rounded. watch: is told figures of what is rounded. share: how far the
    weight is rounded.
    """

    form: LinearFormat
    name: str = ""
    seed: int = 0
    draw: int = 0
    part: int = 0
    parts: tuple[int, ...] = ()
    n_high: int = 0
    watch: Watch | None = None
    share: float = 1.0

    def key(self, form: TensorFormat | None, operand: str) -> int | None:
        """The seed of an operand's stochastic rounding; None where nothing is random."""
        if form is None or form.rounding != "stochastic":
            return None
        # tokens of every part draw their own numbers; the weight is the same matrix in all of them
        part = "" if operand.endswith(".w") else f" {self.part}"
        return stream(self.seed, f"{self.name} {operand}{part}", self.draw)

    @property
    def tokens_in_block(self) -> int:
        """The number of tokens must be a multiple of this in the weight gradient."""
        return max(form.block[1] if form is not None else 1 for form in self.form.wgrad)

    def shares(self, form: TensorFormat | None, x: Tensor) -> bool:
        """Whether x (T, C), rounded to this format, may stand for its transpose in the weight gradient."""
        return form is not None and form.is_symmetric and x.shape[0] % self.tokens_in_block == 0


def three_gemms(x: Tensor, w: Tensor, call: Call) -> Tensor:
    """y = x W^T, whose backward pass rounds as `call.form` says.

    Args:
        x: (..., K) in the compute dtype.
        w: (N, K), the master, any float dtype.
        call: formats and what random rounding draws from.

    Returns: (..., N) in x.dtype.
    """
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        y = _ThreeGemms.apply(x, w, call)
        assert isinstance(y, Tensor)
        return y
    return _forward(x, w, call, keeps=False)[0].view(*x.shape[:-1], w.shape[0])


class _ThreeGemms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, call: Call) -> Tensor:  # type: ignore[no-untyped-def, override]
        y, kept = _forward(x, w, call, keeps=w.requires_grad)
        ctx.call, ctx.kept, tensors = call, None, []
        if kept is not None:
            ctx.kept, tensors = (kept.form, kept.is_packed, kept.is_turned), [*kept.tensors]
            if call.n_high and kept.form is not None:
                tensors.append(x.flatten(0, -2))
        ctx.save_for_backward(w, *tensors)
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[no-untyped-def, override]
        w, *kept = ctx.saved_tensors
        call: Call = ctx.call
        dy_TN = dy.flatten(0, -2)
        n = w.shape[0] - call.n_high
        low, high = (dy_TN, None) if not call.n_high else dy_TN.split([n, call.n_high], dim=1)
        rounded = None
        dx = dw = None
        if ctx.needs_input_grad[0]:
            native = is_native(call.form.dgrad, dy.device)
            rounded = round_to(call.form.dgrad[0], low, packed=native, seed=call.key(call.form.dgrad[0], "dgrad.dy"))
            weight = _weight(w[:n], call, "dgrad", dy.dtype, packed=native)
            if call.watch is not None:
                tell(call.watch, "dy", low, rounded)
            dx = product(rounded, weight, dy.dtype)
            if high is not None:
                dx = dx + high @ w[n:].to(dy.dtype)
            dx = dx.view(*dy.shape[:-1], w.shape[1])
        if ctx.needs_input_grad[1]:
            form, is_packed, is_turned = ctx.kept
            x_TK = kept.pop() if high is not None and form is not None else kept[0]
            x_KT = Operand(form, tuple(kept), is_packed, is_turned)
            dw = product(_turned(low, rounded, call), x_KT, dy.dtype).to(w.dtype)
            if high is not None:
                dw = torch.cat([dw, (high.t() @ x_TK).to(w.dtype)])
        return dx, dw, None


def _forward(x: Tensor, w: Tensor, call: Call, *, keeps: bool) -> tuple[Tensor, Operand | None]:
    """y (T, N), and what the weight gradient will need of x (..., K)."""
    n, x_TK = w.shape[0] - call.n_high, x.flatten(0, -2)
    rounded, kept = _read(x, call, keeps=keeps)
    weight = _weight(w[:n], call, "fprop", x.dtype, packed=is_native(call.form.fprop, x.device))
    if call.watch is not None:
        tell(call.watch, "x", x_TK, rounded)
        tell(call.watch, "w", w[:n], weight)
    # only here may sums keep fewer bits: gradients are smaller, and summed over more
    y = product(rounded, weight, x.dtype, fast=True)
    return (torch.cat([y, x_TK @ w[n:].to(x.dtype).t()], dim=1) if call.n_high else y), kept


@dataclass(frozen=True, slots=True)
class _Read:
    """An input, how it was read, and what it was rounded to."""

    x: weakref.ref[Tensor]
    how: tuple[object, ...]
    operands: tuple[Operand, Operand | None]


# the latest only, and no longer than its input lives
_latest: list[_Read] = []


def _read(x: Tensor, call: Call, *, keeps: bool) -> tuple[Operand, Operand | None]:
    """x (..., K) rounded for the forward product, and transposed to be kept for the weight gradient."""
    form, x_TK = call.form, x.flatten(0, -2)
    how = (form.fprop, form.wgrad, keeps, None if x.is_inference() else x._version)
    # a copy of the list: other threads may change it
    for latest in tuple(_latest):
        if latest.x() is x and latest.how == how:
            return latest.operands
    packed = is_native(form.fprop, x.device) or (form.fprop[0] == form.wgrad[1] and call.shares(form.fprop[0], x_TK))
    seeds = call.key(form.fprop[0], "fprop.x"), call.key(form.wgrad[1], "wgrad.x")
    rounded = round_to(form.fprop[0], x_TK, packed=packed, seed=seeds[0])
    kept = _kept(x_TK, rounded, call) if keeps else None
    _latest.clear()
    # each layer has chances of its own; plain numbers are x itself; inference counts no changes
    plain = rounded.form is None or (kept is not None and kept.form is None)
    if seeds == (None, None) and not plain and not x.is_inference():
        _latest.append(_Read(weakref.ref(x, _forget), how, (rounded, kept)))
    return rounded, kept


def _forget(x: weakref.ref[Tensor]) -> None:
    _latest[:] = [read for read in _latest if read.x is not x]


def _weight(w: Tensor, call: Call, name: Literal["fprop", "dgrad"], dtype: torch.dtype, *, packed: bool) -> Operand:
    """The weight of the forward product, or the transposed one of the data gradient: (1 - share) W + share Q(W)."""
    turned = name == "dgrad"
    form = call.form.dgrad[1] if turned else call.form.fprop[1]
    key = call.key(form, f"{name}.w")
    rounded = round_to(form, w, turned=turned, packed=packed, seed=key, parts=call.parts)
    if form is None or call.share >= 1:
        return rounded
    values, descale = rounded.opened(torch.float32)
    values = values if descale is None else values * descale
    return Operand(None, (torch.lerp(w.t().float() if turned else w.float(), values, call.share).to(dtype),))


def _kept(x: Tensor, rounded: Operand, call: Call) -> Operand:
    """The transposed input (K, T) of the weight gradient; the forward product's codes where they are the same."""
    form = call.form.wgrad[1]
    if form == rounded.form and call.shares(form, x):
        return rounded.turned
    x = pad_rows(x, call.tokens_in_block)
    return round_to(form, x, turned=True, packed=True, seed=call.key(form, "wgrad.x"))


def _turned(dy: Tensor, rounded: Operand | None, call: Call) -> Operand:
    """The transposed gradient (N, T) of the weight gradient; the data gradient's codes where they are the same."""
    form = call.form.wgrad[0]
    if rounded is not None and form == rounded.form and call.shares(form, dy):
        return rounded.turned
    native = is_native(call.form.wgrad, dy.device)
    dy = pad_rows(dy, call.tokens_in_block)
    return round_to(form, dy, turned=True, packed=native, seed=call.key(form, "wgrad.dy"))
