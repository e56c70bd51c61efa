"""The native softmax of the head against the reference in float64."""

import math
import random

import pytest
import torch

from plait.kernels.native.loss import cross_entropy_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_equal_their_formula(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(n_shapes):
        rows, V = random.choice([1, 2, 33]), random.choice([2, 15, 16, 17, 100, 1000])
        logits = (torch.randn(rows, V) * random.choice([0.1, 3.0, 30.0])).to(dtype)
        targets = torch.randint(0, V, (rows,))
        targets[torch.rand(rows) < 0.3] = -100
        exact = logits.double().requires_grad_()
        want = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        want.sum().backward()
        got = logits.clone()
        losses = cross_entropy_rows(got, targets, wants_gradient=True)
        # a loss is a difference of logits of up to 100
        torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=2e-5)
        assert exact.grad is not None
        torch.testing.assert_close(got.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_targets_may_be_narrower_numbers(target: str) -> None:
    logits, targets = torch.randn(5, 17), torch.tensor([3, -100, 16, 0, 7])
    want = cross_entropy_rows(logits.clone(), targets, wants_gradient=True)
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(cross_entropy_rows(logits.clone(), targets.to(dtype), wants_gradient=True), want)


def test_without_gradient_the_logits_stay(target: str) -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    cross_entropy_rows(logits, torch.tensor([1, -100, 3]), wants_gradient=False)
    assert torch.equal(logits, before)


def test_what_is_no_number_is_not_hidden(target: str) -> None:
    logits = torch.randn(2, 40)
    logits[1, 17] = math.nan
    assert cross_entropy_rows(logits, torch.tensor([0, 0]), wants_gradient=True).isnan().tolist() == [False, True]
