"""Native norms against the reference in float64: odd widths, slices of wider rows, every gradient."""

import random

import pytest
import torch
from tests.kernels.native.gradients import assert_equals_reference
from torch import Tensor

from plait.ops.norm import gated_rmsnorm, rms_norm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_equals_its_reference(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(n_shapes):
        rows, D = random.choice([1, 2, 63, 130]), random.choice([1, 7, 16, 63, 129, 512])
        x, w = torch.randn(rows, D).to(dtype), torch.randn(D)
        assert_equals_reference(lambda x, w: rms_norm(x, w, eps=1e-3), [x, w])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_norm_equals_its_reference(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(n_shapes):
        L, groups, n = random.choice([1, 5, 65]), random.choice([1, 2, 3, 8]), random.choice([1, 9, 16, 40, 128])
        D, before, after = groups * n, random.randrange(20), random.randrange(20)
        wide = torch.randn(2, L, before + D + after).to(dtype)

        def norm(x: Tensor, wide: Tensor, w: Tensor, at: int = before, D: int = D, groups: int = groups) -> Tensor:
            return gated_rmsnorm(x, wide[..., at : at + D], w, groups=groups)

        assert_equals_reference(norm, [torch.randn(2, L, D).to(dtype), wide, torch.randn(D)])


def test_a_row_that_is_no_number_stays_none(target: str) -> None:
    x = torch.randn(3, 40)
    x[1, 5] = float("nan")
    assert rms_norm(x, torch.ones(40)).isnan().any(-1).tolist() == [False, True, False]
    assert gated_rmsnorm(torch.ones(3, 40), x, torch.ones(40), groups=1).isnan().any(-1).tolist() == [
        False,
        True,
        False,
    ]
