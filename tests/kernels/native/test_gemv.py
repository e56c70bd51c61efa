"""Products with a few rows equal the reference in float64, for weights in every form."""

import random

import pytest
import torch

from plait.kernels.native import gemv
from plait.ops.dispatch import use
from plait.ops.linear import linear
from plait.ops.quant import dequantize_groups, quantize_groups, weight_only_linear

FORMS = [(bits, group, zeros) for bits in (8, 4) for group in (32, 64, 128) for zeros in (False, True)]


def tolerance(dtype: torch.dtype, K: int) -> float:
    """Roundings of the result, and of sums of K products about sqrt(K) large, kept in float32."""
    return 2 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def assert_close(got: torch.Tensor, want: torch.Tensor, K: int) -> None:
    assert (got.double() - want).abs().max() <= tolerance(got.dtype, K) * max(float(want.abs().max()), K**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 63), (2, 3, 64), (3, 37, 65), (4, 8, 96), (8, 130, 200)], ids=str)
def test_linear_equals_the_product_in_float64(target: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, N, K = shape
    x, w, bias = torch.randn(B, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    with use("native"), torch.no_grad():
        assert_close(linear(x, w), x.double() @ w.double().T, K)
        assert_close(linear(x[:, None], w, bias)[:, 0], x.double() @ w.double().T + bias.double(), K)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_equal_the_weights_that_they_stand_for(target: str, form: tuple[int, int, bool]) -> None:
    bits, group, zeros = form
    codes, scales, points = quantize_groups(torch.randn(13, 384) + 0.5 * zeros, bits, group, zeros)
    held, bias = dequantize_groups(codes, scales, points, bits=bits), torch.randn(13)
    for dtype in (torch.float32, torch.bfloat16):
        for B in (1, 3, 8, 9, 40):
            x = torch.randn(B, 384).to(dtype)
            # weights meet many rows in their dtype
            w = held.to(dtype).double() if B > 8 else held.double()
            with use("native"), torch.no_grad():
                got = weight_only_linear(x, codes, scales, points, bias, bits=bits, group=group)
            assert got.dtype == dtype
            assert_close(got, x.double() @ w.T + bias.to(dtype).double(), 384)


def test_random_shapes_agree(n_shapes: int) -> None:
    rng = random.Random(0)
    for _ in range(n_shapes):
        bits, group, zeros = rng.choice(FORMS)
        B, N, K = rng.randint(1, 12), rng.randint(1, 90), 128 * rng.randint(1, 9)
        x = torch.randn(B, K).to(rng.choice([torch.float32, torch.bfloat16]))
        codes, scales, points = quantize_groups(torch.randn(N, K), bits, group, zeros)
        w = dequantize_groups(codes, scales, points, bits=bits).to(x.dtype if B > 8 else torch.float32)
        with use("native"), torch.no_grad():
            assert_close(
                weight_only_linear(x, codes, scales, points, bits=bits, group=group), x.double() @ w.double().T, K
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 7, 45])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(target: str, N: int, dtype: torch.dtype) -> None:
    for K in (32, 96, 65, 1056, 16416):
        w, x = torch.randn(N, K).to(dtype), torch.randn(19, K).to(dtype)
        alone = torch.cat([gemv.linear(row[None], w, None) for row in x])
        for B in range(2, len(x) + 1):
            assert torch.equal(gemv.linear(x[:B], w, None), alone[:B])


def test_gradients_take_the_ordinary_path() -> None:
    x, w = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5)
    linear(x, w).sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(2, 5))
