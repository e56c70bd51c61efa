"""Activations of the feed-forward layers that torch does not have.

    squared_relu   y = max(x, 0)^2
    swiglu         y = silu(g) * x

Numbers  computed in the input dtype; squared ReLU overflows float16 beyond 255, so use bfloat16 or float32.
Source   So et al. 2021, arXiv:2109.08668 (squared ReLU); Shazeer 2020, arXiv:2002.05202 (gated units).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import Op, native_serves, triton_serves


@Op
def squared_relu(x: Tensor) -> Tensor:
    """Square of the positive part, element by element; shape and dtype of x."""
    return F.relu(x).square()


@squared_relu.backend("triton", when=lambda x: x.dtype != torch.float64 and triton_serves(x))
def _(x: Tensor) -> Tensor:
    from plait.kernels.triton.activation import SquaredReLU

    return SquaredReLU.apply(x)


@squared_relu.backend("native", when=lambda x: x.is_contiguous() and native_serves("activation", x))
def _(x: Tensor) -> Tensor:
    from plait.kernels.native.activation import SquaredReLU

    return SquaredReLU.apply(x)


@squared_relu.backend("eager", when=lambda x: x.requires_grad)
def _(x: Tensor) -> Tensor:
    from plait.kernels.eager.activation import SquaredReLU

    return SquaredReLU.apply(x)


@Op
def gate(g: Tensor, x: Tensor, *, activation: str) -> Tensor:
    """Gate x by an activated g: SwiGLU for "silu", BitNet's gated squared ReLU for "relu2".

    Args:
        g, x: (..., F) the gate's and the value's projections, same dtype.
        activation: "silu" or "relu2".

    Returns: (..., F) in x.dtype.
    Raises: ValueError for another activation.
    """
    if activation == "silu":
        return F.silu(g) * x
    if activation == "relu2":
        return squared_relu(g) * x
    raise ValueError(f"activation={activation!r}: a gated layer takes 'silu' or 'relu2'")


def _gates_on_triton(g: Tensor, x: Tensor, *, activation: str) -> bool:
    alike = g.shape == x.shape and g.dtype == x.dtype != torch.float64 and activation in ("silu", "relu2")
    return alike and x.numel() > 0 and triton_serves(g, x)


@gate.backend("triton", when=_gates_on_triton)
def _(g: Tensor, x: Tensor, *, activation: str) -> Tensor:
    from plait.kernels.triton.activation import Gate

    return Gate.apply(g, x, activation == "silu")
