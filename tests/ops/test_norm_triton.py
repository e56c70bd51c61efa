"""Triton norms against the reference in float64: odd widths, slices of wider rows, every gradient."""

import itertools
import random

import pytest
import torch
from tests.kernels.native.gradients import assert_equals_reference
from torch import Tensor

from plait.kernels.triton.gated_norm import DEFAULTS
from plait.ops.dispatch import BackendError, use
from plait.ops.norm import add_rms_norm, gated_rmsnorm, rms_norm

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few rows make several, and that programs have several to walk."""
    for kernel in ("rms_norm", "rms_norm_backward", "gated_rmsnorm", "gated_rmsnorm_backward"):
        monkeypatch.setitem(DEFAULTS, kernel, {**DEFAULTS[kernel], "NUMBERS": 256})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "D"), [(1, 1), (1, 63), (37, 7), (63, 16), (5, 129), (0, 8)])
def test_rms_norm_equals_its_reference(rows: int, D: int, dtype: torch.dtype, device: str) -> None:
    if rows == 0:
        with use("triton"):
            assert rms_norm(torch.ones(0, D, device=device, dtype=dtype), torch.ones(D, device=device)).shape == (0, D)
        return
    x, w = torch.randn(rows, D, device=device).to(dtype), torch.randn(D, device=device)
    assert_equals_reference(lambda x, w: rms_norm(x, w, eps=1e-3), [x, w], backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_random_shapes_and_slices(dtype: torch.dtype, n_shapes: int, device: str) -> None:
    for _ in range(n_shapes):
        B, L, D, before = (random.randrange(1, n) for n in (4, 12, 140, 20))

        def norm(wide: Tensor, w: Tensor, at: int = before, D: int = D) -> Tensor:
            return rms_norm(wide[..., at : at + D], w, eps=1e-3)

        wide = torch.randn(B, L, before + D + 3, device=device).to(dtype)
        assert_equals_reference(norm, [wide, torch.randn(D, device=device)], backend="triton")


def _added(x: Tensor, residual: Tensor, w: Tensor, used: str, backend: str) -> list[Tensor | None]:
    x, residual, w = (t.detach().clone().requires_grad_() for t in (x, residual, w))
    with use(backend):
        y, total = add_rms_norm(x, residual, w, eps=1e-3)
    g = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
    loss = (y.double() * g).sum() * ("y" in used) + (total.double() * g.flip(-1)).sum() * ("t" in used)
    return [y, total, *torch.autograd.grad(loss, (x, residual, w), allow_unused=True)]


def _close(got: Tensor | None, exact: Tensor | None, eps: float) -> None:
    if got is None or exact is None:
        # no gradient, or one of zeros
        assert all(t is None or not t.any() for t in (got, exact))
        return
    limit = (eps + 64 * torch.finfo(torch.float32).eps) * max(1.0, float(exact.detach().abs().max()))
    assert float((got.double() - exact).abs().max()) <= limit


@pytest.mark.parametrize("used", ["y", "t", "yt"])
@pytest.mark.parametrize(("x_dtype", "r_dtype"), list(itertools.product(DTYPES[:2], DTYPES[:2])), ids=str)
def test_adding_and_norming_equal_the_reference(
    x_dtype: torch.dtype, r_dtype: torch.dtype, used: str, device: str
) -> None:
    x, residual = torch.randn(3, 9, 70, device=device).to(x_dtype), torch.randn(3, 9, 70, device=device).to(r_dtype)
    w = torch.randn(70, device=device)
    got = _added(x, residual, w, used, "triton")
    plain = _added(x, residual, w, used, "reference")
    assert [t.dtype for t in got if t is not None] == [t.dtype for t in plain if t is not None]
    exact = _added(x.double(), residual.double(), w.double(), used, "reference")
    eps = max(torch.finfo(x_dtype).eps, torch.finfo(r_dtype).eps)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        # one rounding of the sum, one of the result; dw adds up those of its rows
        _close(a, b, eps * (27**0.5 if i == 4 else 2))


def test_adding_and_norming_equal_doing_one_after_the_other_to_the_last_bit(device: str) -> None:
    x, residual = torch.randn(7, 33, device=device).half(), torch.randn(7, 33, device=device).half()
    with use("triton"):
        y, total = add_rms_norm(x, residual, torch.ones(33, device=device))
        assert torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(total, torch.ones(33, device=device)))


def test_adding_and_norming_random_shapes(n_shapes: int, device: str) -> None:
    for _ in range(n_shapes):
        rows, D = random.randrange(1, 40), random.randrange(1, 150)
        x, residual, w = (torch.randn(shape, device=device) for shape in ((rows, D), (rows, D), (D,)))
        got = _added(x, residual, w, "yt", "triton")
        exact = _added(x.double(), residual.double(), w.double(), "yt", "reference")
        for a, b in zip(got, exact, strict=True):
            _close(a, b, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_norm_equals_its_reference(dtype: torch.dtype, n_shapes: int, device: str) -> None:
    for _ in range(n_shapes):
        L, groups, P = random.choice([1, 5, 9]), random.choice([1, 2, 3, 8]), random.choice([1, 9, 16, 40, 65])
        D, before, after = groups * P, random.randrange(20), random.randrange(20)
        wide = torch.randn(2, L, before + D + after, device=device).to(dtype)

        def norm(x: Tensor, wide: Tensor, w: Tensor, at: int = before, D: int = D, groups: int = groups) -> Tensor:
            return gated_rmsnorm(x, wide[..., at : at + D], w, groups=groups)

        x, w = torch.randn(2, L, D, device=device).to(dtype), torch.randn(D, device=device)
        assert_equals_reference(norm, [x, wide, w], backend="triton", growth=1.0)


def test_gated_norm_of_float32_values_and_half_gates(device: str) -> None:
    x, z, w = torch.randn(2, 3, 24, device=device), torch.randn(2, 3, 24, device=device).half(), torch.ones(24)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            results.append(gated_rmsnorm(x, z, w.to(device), groups=3))
    assert results[0].dtype == torch.float16
    torch.testing.assert_close(*results, rtol=2**-10, atol=1e-6)


def test_slices_of_wider_rows_are_read_in_place(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    wide = torch.randn(2, 5, 64, device=device)

    def norms() -> tuple[Tensor, Tensor]:
        gated = gated_rmsnorm(wide[..., :16], wide[..., 16:32], torch.ones(16, device=device), groups=2)
        return gated, rms_norm(wide[..., 16:48], torch.ones(32, device=device))

    with use("reference"):
        expected = norms()
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    with use("triton"):
        got = norms()
    monkeypatch.undo()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_that_is_no_number_stays_none(device: str) -> None:
    x = torch.randn(3, 40, device=device)
    x[1, 5] = float("nan")
    one = torch.ones(40, device=device)
    with use("triton"):
        for y in (rms_norm(x, one), add_rms_norm(x, x, one)[0], gated_rmsnorm(x, x, one, groups=1)):
            assert y.isnan().any(-1).tolist() == [False, True, False]


def test_float64_is_left_to_the_reference() -> None:
    with use("triton"), pytest.raises(BackendError):
        rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3))
