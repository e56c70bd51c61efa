"""The cross-entropy's Triton kernel against torch's in float64: values, gradients, left-out rows, slices, formats."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import plait.ops.loss as module
from plait.kernels.triton import tuning
from plait.kernels.triton.loss import cross_entropy_rows
from plait.ops.dispatch import use
from plait.ops.loss import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # several blocks in a small vocabulary
    monkeypatch.setitem(tuning.DEFAULTS, "cross_entropy_rows", {"BLOCK": 64, "num_warps": 4, "num_stages": 2})


def exactly(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient, in float64."""
    x = logits.double().requires_grad_()
    loss = F.cross_entropy(x, targets, ignore_index=-100, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def check_rows(logits: Tensor, targets: Tensor) -> None:
    loss, gradient = exactly(logits, targets)
    eps, size = torch.finfo(logits.dtype).eps, float(logits.abs().max())
    untouched = logits.clone()
    near = {"rtol": 3e-6, "atol": 3e-6 + 1e-7 * size}  # the loss is a difference of such numbers
    got = cross_entropy_rows(untouched, targets, -100, wants_gradient=False)
    torch.testing.assert_close(got.double(), loss, **near)
    torch.testing.assert_close(untouched, logits)
    got = cross_entropy_rows(logits, targets, -100, wants_gradient=True)
    torch.testing.assert_close(got.double(), loss, **near)
    torch.testing.assert_close(logits.double(), gradient, rtol=max(eps, 5e-6), atol=max(eps / 16, 1e-6 + 1e-7 * size))


def test_rows_of_random_sizes_and_formats(n_shapes: int) -> None:
    for seed in range(n_shapes):
        random.seed(seed)
        torch.manual_seed(seed)
        T, V = random.choice([1, 2, 5]), random.choice([1, 2, 63, 64, 65, 300, random.randint(1, 500)])
        dtype = random.choice([torch.float32, torch.float16, torch.bfloat16])
        targets = torch.randint(0, V, (T,))
        targets[torch.rand(T) < 0.3] = -100
        check_rows((torch.randn(T, V) * random.choice([0.1, 3.0, 30.0])).to(dtype), targets)


def test_rows_with_a_stride_and_logits_far_from_zero() -> None:
    logits = torch.randn(4, 200)[:, :130] * 5 + 1e4
    targets = torch.tensor([0, 129, -100, 64])
    loss, _ = exactly(logits, targets)
    got = cross_entropy_rows(logits, targets, -100, wants_gradient=False)
    # near 1e4 the logits themselves are spaced by 1e-3
    torch.testing.assert_close(got.double(), loss, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T", [1, 16, 37])
def test_slices_and_gradients_equal_the_reference(T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GPU_ROWS", 16)
    h, w = torch.randn(T, 8).to(dtype).requires_grad_(), torch.randn(70, 8, requires_grad=True)
    targets = torch.randint(0, 70, (T,))
    targets[1::3] = -100
    with use("triton"):
        got = linear_cross_entropy(h, w, targets, scale=0.3)
    with use("reference"):
        exact = linear_cross_entropy(h.double(), w.to(dtype).double(), targets, scale=0.3)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=4 * eps, atol=4 * eps)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(exact, (h, w)), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=8 * eps, atol=8 * eps)


def test_nothing_is_formed_that_is_not_wanted() -> None:
    h, w, targets = torch.randn(9, 5, requires_grad=True), torch.randn(11, 5), torch.randint(0, 11, (9,))
    with use("triton"):
        (dh,) = torch.autograd.grad(linear_cross_entropy(h, w, targets), h)
        with torch.no_grad():
            loss = linear_cross_entropy(h, w, targets)
    exact = F.cross_entropy(h @ w.T, targets, reduction="sum")
    torch.testing.assert_close(loss, exact.detach())
    torch.testing.assert_close(dh, torch.autograd.grad(exact, h)[0])


def test_a_target_outside_the_vocabulary_gives_no_number() -> None:
    with use("triton"):
        assert linear_cross_entropy(torch.randn(3, 4), torch.randn(10, 4), torch.tensor([1, 10, -100])).isnan()
        assert linear_cross_entropy(torch.randn(3, 4), torch.randn(10, 4), torch.tensor([1, -7, -100])).isnan()


@pytest.mark.gpu
def test_bfloat16_on_the_gpu_sums_the_weights_gradient_in_float32() -> None:
    h = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(3000, 256, device="cuda") * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(0, 3000, (5000,), device="cuda")
    got = linear_cross_entropy(h, w, targets)
    exact = F.cross_entropy(h.double() @ w.double().T, targets, reduction="sum")
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=0)
    for a, b in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(exact, (h, w)), strict=True):
        assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()
