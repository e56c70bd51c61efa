"""The native convolution against the reference in float64: documents, past inputs, slices of wider rows."""

import random

import pytest
import torch
from tests.kernels.native.gradients import assert_equals_reference
from torch import Tensor

from plait.kernels.native.conv import CausalConv
from plait.ops.conv import causal_conv1d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_equals_its_reference(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(4 * n_shapes):
        B, L, W = random.choice([1, 3]), random.choice([1, 2, 3, 63, 64, 65, 130]), random.choice([1, 2, 4, 7])
        D, before, activation = random.choice([1, 8, 17, 40]), random.randrange(9), random.random() < 0.7
        wide = torch.randn(B, L, before + D + 3).to(dtype)
        bias = torch.randn(D) if random.random() < 0.7 else None
        initial = torch.randn(B, D, W).to(dtype) if random.random() < 0.5 else None
        starts = torch.rand(B, L) < 0.2 if random.random() < 0.5 else None

        def conv(
            wide: Tensor,
            w: Tensor,
            bias: Tensor | None,
            initial: Tensor | None,
            starts: Tensor | None,
            at: int = before,
            D: int = D,
            activation: bool = activation,
        ) -> Tensor:
            x = wide[..., at : at + D]
            return causal_conv1d(x, w, bias, initial=initial, starts=starts, activation=activation)

        assert_equals_reference(conv, [wide, torch.randn(D, W), bias, initial, starts])


def test_no_tokens_give_their_past_no_gradient(target: str) -> None:
    past = torch.randn(2, 3, 8, requires_grad=True)
    y = CausalConv.apply(torch.randn(2, 0, 8), past, torch.randn(8, 4), None, None, True)
    y.sum().backward()
    assert y.shape == (2, 0, 8) and (past.grad == 0).all()
