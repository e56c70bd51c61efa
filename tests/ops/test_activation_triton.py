"""Squared ReLU and gates in Triton against the reference, values and gradients, in the interpreter or on a GPU."""

import pytest
import torch

from plait.ops.activation import gate, squared_relu
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


def _gated(g: torch.Tensor, x: torch.Tensor, activation: str) -> None:
    """A result and two gradients against float64: each a few products in float32, and one rounding."""
    results, dy = [], torch.randn_like(x)
    for backend in ("triton", "reference"):
        exact = backend == "reference"
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in (g, x)]
        with use(backend):
            y = gate(leaves[0], leaves[1], activation=activation)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    eps = max(torch.finfo(x.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    for got, exact in zip(*results, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        # silu's slope crosses zero: there the terms of its sum count
        torch.testing.assert_close(got.double(), exact.double(), rtol=eps, atol=4 * eps)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 2049)], ids=str)
def test_gates_and_both_gradients(shape: tuple[int, ...], dtype: torch.dtype, activation: str, device: str) -> None:
    _gated(*(torch.randn(shape, device=device).to(dtype) for _ in range(2)), activation)  # type: ignore[call-arg]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_gates_with_strides_and_values_far_out(activation: str, device: str) -> None:
    both = torch.randn(5, 24, device=device)
    _gated(both[:, :12], both[:, 12:], activation)
    _gated(torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4], device=device), torch.ones(6, device=device), activation)
    with use("triton"):
        assert gate(
            torch.tensor([torch.nan], device=device), torch.ones(1, device=device), activation=activation
        ).isnan()


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_random_gates(activation: str, n_shapes: int, device: str) -> None:
    for seed in range(n_shapes):
        g = torch.Generator().manual_seed(seed)
        shape = torch.randint(1, 40, (int(torch.randint(1, 4, (1,), generator=g)),), generator=g).tolist()
        dtype = torch.float16 if seed % 2 else torch.float32
        _gated(*(torch.randn(shape, generator=g).to(device, dtype) for _ in range(2)), activation)  # type: ignore[call-arg]
