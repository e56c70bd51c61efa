"""The native ternary product equals its reference bit for bit, in every build, at odd sizes, for few rows and many."""

import random

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import BackendError, use
from plait.ops.ternary import pack_ternary, ternary_linear


def inputs(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(M, K) * random.choice([1e-7, 1e-3, 1.0, 100.0])
    if random.random() < 0.4:
        x = (8 * x).round() / 8  # many ties
    return x.to(dtype), pack_ternary(torch.randint(-1, 2, (N, K), dtype=torch.int8)), torch.rand(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_is_that_of_the_reference(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(4 * n_shapes):
        M, N = random.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 65, 130]), random.choice([1, 3, 4, 5, 17, 64, 101])
        K = random.choice([1, 7, 16, 64, 176, 255, 256, 257, 512, 700, 1030])
        x, codes, scales = inputs(M, N, K, dtype)
        bias = torch.randn(N) if random.random() < 0.5 else None
        with use("native"):
            y = ternary_linear(x, codes, scales, bias)
        assert y.dtype == dtype and torch.equal(y, ternary_linear.reference(x, codes, scales, bias)), (M, N, K)


@pytest.mark.parametrize("M", [1, 4, 9])
def test_the_largest_sums_do_not_overflow_a_step(target: str, M: int) -> None:
    K = 70_000
    x, codes = torch.full((M, K), -127.0), pack_ternary(torch.ones(5, K, dtype=torch.int8))
    x[0], codes[1] = 127.0, pack_ternary(-torch.ones(1, K, dtype=torch.int8))[0]
    with use("native"):
        y = ternary_linear(x, codes, torch.ones(5))
    assert torch.equal(y, ternary_linear.reference(x, codes, torch.ones(5))) and y[0, 0] == 127.0 * K


def test_what_is_no_number_makes_its_row_none(target: str) -> None:
    x, codes, scales = inputs(5, 9, 300, torch.float32)
    x[2, 299], x[3, 0] = torch.nan, torch.inf
    with use("native"):
        y = ternary_linear(x, codes, scales)
    assert y[2:4].isnan().all() and y[[0, 1, 4]].isfinite().all()


def test_what_does_not_fit_is_left_to_the_reference() -> None:
    x, codes, scales = inputs(2, 9, 300, torch.float32)
    for args in (
        (x[:, :200], codes, scales),
        (x, codes, scales.double()),
        (x, codes[:, ::2], scales),
        (x.double(), codes, scales),
    ):
        with use("native"), pytest.raises(BackendError):
            ternary_linear(*args)
