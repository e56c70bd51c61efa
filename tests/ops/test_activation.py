"""Activations against their formulae."""

import pytest
import torch

from plait.ops.activation import gate, squared_relu


def test_squared_relu_squares_the_positive_part() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])
    assert squared_relu(x).tolist() == [0.0, 0.0, 0.0, 0.25, 9.0]


def test_gates() -> None:
    g, x = torch.randn(4, 9, dtype=torch.double), torch.randn(4, 9, dtype=torch.double)
    torch.testing.assert_close(gate(g, x, activation="silu"), g / (1 + (-g).exp()) * x)
    torch.testing.assert_close(gate(g, x, activation="relu2"), g.clamp(min=0) ** 2 * x)
    with pytest.raises(ValueError, match="activation='gelu'"):
        gate(g, x, activation="gelu")


def test_squared_relu_has_the_right_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, x)
