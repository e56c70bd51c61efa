"""What kernels give as a gradient has no gradient itself: asking for it is an error, not a wrong number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.ops.activation import squared_relu
from plait.ops.conv import causal_conv1d
from plait.ops.dispatch import use
from plait.ops.norm import gated_rmsnorm, rms_norm

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(16)),
    "gated_rmsnorm": lambda x: gated_rmsnorm(x, x, torch.ones(16), groups=2),
    "squared_relu": squared_relu,
    "causal_conv1d": lambda x: causal_conv1d(x, torch.ones(16, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(target: str, name: str) -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    with use("native"):
        (dx,) = torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
