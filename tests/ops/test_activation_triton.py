"""Squared ReLU in Triton against the reference, values and gradient, in the interpreter or on a GPU."""

import pytest
import torch

from plait.ops.activation import squared_relu
from plait.ops.dispatch import use

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def _both(x: torch.Tensor) -> None:
    """One rounding of one product each way: the same numbers to the last bit."""
    results, dy = [], torch.randn_like(x)
    for backend in ("triton", "reference"):
        with use(backend):
            leaf = x.detach().requires_grad_()
            y = squared_relu(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, expected, rtol=torch.finfo(x.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 4097), (0, 3)], ids=str)
def test_values_and_gradient_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    _both(torch.randn(shape, device=device).to(dtype))


def test_views_with_strides_and_values_out_of_range(device: str) -> None:
    _both(torch.randn(5, 12, device=device)[:, 3:9])
    _both(torch.randn(5, 12, device=device).t())
    _both(torch.tensor([float("nan"), -float("inf"), float("inf"), -0.0], device=device))


def test_random_shapes(n_shapes: int, device: str) -> None:
    for seed in range(n_shapes):
        g = torch.Generator().manual_seed(seed)
        shape = torch.randint(1, 40, (int(torch.randint(1, 4, (1,), generator=g)),), generator=g).tolist()
        _both(torch.randn(shape, generator=g).to(device, torch.float16 if seed % 2 else torch.float32))
