"""The native squared ReLU against its reference in float64."""

import random

import pytest
import torch
from tests.kernels.native.gradients import assert_equals_reference

from plait.ops.activation import squared_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squared_relu_equals_its_reference(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(n_shapes):
        shape = random.choice([1, 2, 5]), random.choice([1, 15, 16, 17, 63, 200])
        assert_equals_reference(squared_relu, [torch.randn(shape).to(dtype)])


def test_what_is_no_number_stays_none(target: str) -> None:
    x = torch.tensor([-1.0, float("nan"), 2.0] * 7)
    assert squared_relu(x).isnan().sum() == 7
