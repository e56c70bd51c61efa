"""The rotation in Triton against float64: values and gradient, odd sizes, partly rotated heads, strided inputs."""

import random

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.rope import Rope, inverse_frequencies, rotate

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def _both(x: Tensor, positions: Tensor, rope: Rope, most: float = 1.0) -> None:
    """Against float64 angles: float32 rounds an angle t w, up to `most`, by half an ulp, and sine and cosine follow."""
    w, temperature = inverse_frequencies(rope, x.shape[3])
    w, dy = w.to(x.device), torch.randn_like(x)
    results = []
    for backend in ("triton", "reference"):
        leaf = (x if backend == "triton" else x.double()).detach().requires_grad_()
        with use(backend):
            y = rotate(leaf, positions, w, temperature=temperature)
        assert y.shape == x.shape and y.dtype == leaf.dtype or backend == "reference"
        results.append((y, *torch.autograd.grad(y, leaf, dy.to(y.dtype))))
    eps = torch.finfo(x.dtype).eps
    limit = temperature * (eps + 4 * torch.finfo(torch.float32).eps * max(1.0, most))
    for got, exact in zip(*results, strict=True):
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), exact.double(), rtol=limit, atol=4 * limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "P", "rotated"), [(1, 2, 1.0), (3, 6, 1.0), (5, 20, 0.5), (2, 64, 1.0), (33, 10, 0.4)])
def test_values_and_gradient(H: int, P: int, rotated: float, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(2, 7, H, P, device=device).to(dtype)
    positions = torch.randint(0, 100, (2, 7), device=device)
    _both(x, positions, Rope(base=1000.0, rotated=rotated), most=100.0)


def test_positions_of_all_rows_and_far_ones_and_a_temperature(device: str) -> None:
    rope = Rope(base=10000.0, scaling="yarn", stretch=8.0, original_context=64, low=1.0, high=32.0)
    x = torch.randn(3, 5, 4, 16, device=device)
    _both(x, torch.arange(5, device=device)[None], rope)
    _both(x, torch.randint(0, 1 << 20, (3, 5), device=device), rope, most=float(1 << 20))
    # positions as a row repeated without memory of its own
    _both(x, torch.arange(5, device=device)[None].expand(3, 5), rope)


def test_inputs_that_lie_anyhow(device: str) -> None:
    positions, rope = torch.arange(6, device=device)[None], Rope()
    wide = torch.randn(2, 6, 3, 5, 8, device=device)
    _both(wide[:, :, 1], positions, rope)
    _both(torch.randn(2, 5, 6, 8, device=device).transpose(1, 2), positions, rope)
    _both(torch.randn(2, 6, 8, 5, device=device).transpose(2, 3), positions, rope)


def test_heads_that_lie_billions_of_numbers_apart() -> None:
    # memory that is not touched takes none
    wide = torch.empty((1 << 31) + 8, dtype=torch.float16)
    x = wide.as_strided((1, 1, 3, 8), (8, 8, 1 << 30, 1))
    x.copy_(torch.randn(x.shape))
    w, positions = inverse_frequencies(Rope(), 8)[0], torch.full((1, 1), 3)
    with use("triton"):
        y = rotate(x, positions, w)
    torch.testing.assert_close(y, rotate(x.contiguous(), positions, w))


def test_heads_in_several_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from plait.kernels.triton.rope import DEFAULTS

    monkeypatch.setitem(DEFAULTS, "rotate", {"NUMBERS": 8, "num_warps": 4})
    _both(torch.randn(1, 3, 5, 8, device=device), torch.arange(3, device=device)[None], Rope())


def test_turning_back_is_the_inverse_and_has_a_gradient_of_its_own(device: str) -> None:
    x = torch.randn(1, 4, 2, 8, device=device, dtype=torch.float32, requires_grad=True)
    w, _ = inverse_frequencies(Rope(), 8)
    positions = torch.arange(4, device=device)[None]
    with use("triton"):
        y = rotate(x, positions, w.to(device))
        (back,) = torch.autograd.grad(y, x, y, create_graph=True)
        torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
        (second,) = torch.autograd.grad(back.sum(), x)
    torch.testing.assert_close(second, torch.ones_like(x), rtol=1e-6, atol=1e-6)


def test_random_shapes(n_shapes: int, device: str) -> None:
    for seed in range(n_shapes):
        random.seed(seed)
        torch.manual_seed(seed)
        B, L, H, half, rest = (random.randint(1, n) for n in (3, 9, 7, 12, 9))
        P = 2 * half + (rest - 1 if seed % 3 else 0)
        x = torch.randn(B, L, H, P, device=device).to(random.choice([torch.float32, torch.float16]))
        _both(
            x, torch.randint(0, 50, (random.choice([1, B]), L), device=device), Rope(rotated=(2 * half + 0.5) / P), 50.0
        )
