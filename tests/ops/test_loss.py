"""The sliced cross-entropy against torch's over whole logits: values, gradients, left-out targets, memory."""

import pytest
import torch
import torch.nn.functional as F

import plait.ops.loss as module
from plait.ops.dispatch import use
from plait.ops.loss import linear_cross_entropy


@pytest.mark.parametrize("T", [1, 7, 64])
def test_slices_equal_the_whole(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_LOGITS", 11 * 16)  # 16 tokens a slice
    monkeypatch.setattr(module, "BLOCK_LOGITS", 11 * 5)
    h, w = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((T, 5), (11, 5)))
    targets = torch.randint(0, 11, (T,))
    targets[::3] = -100
    exact = F.cross_entropy(h @ w.T, targets, ignore_index=-100, reduction="sum") * 0.3
    for backend in ("sliced", "reference"):
        with use(backend):
            got = linear_cross_entropy(h, w, targets, scale=0.3)
        torch.testing.assert_close(got, exact)
        for a, b in zip(
            torch.autograd.grad(got, (h, w), retain_graph=True),
            torch.autograd.grad(exact, (h, w), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_a_frozen_head_or_no_gradient_at_all_is_fine() -> None:
    h, w, targets = torch.randn(9, 5, requires_grad=True), torch.randn(11, 5), torch.randint(0, 11, (9,))
    exact = F.cross_entropy(h @ w.T, targets, reduction="sum")
    got = linear_cross_entropy(h, w, targets)
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(*(torch.autograd.grad(loss, h)[0] for loss in (got, exact)))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, w, targets), exact)


def test_without_gradients_none_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, targets = torch.randn(9, 5), torch.randn(11, 5, requires_grad=True), torch.randint(0, 11, (9,))
    wanted: list[bool] = []
    real = module._loss_of

    def noted(logits: torch.Tensor, targets: torch.Tensor, wants_gradient: bool) -> torch.Tensor:
        wanted.append(wants_gradient)
        return real(logits, targets, wants_gradient)

    monkeypatch.setattr(module, "_loss_of", noted)
    with torch.no_grad():
        linear_cross_entropy(h, w, targets)
    linear_cross_entropy(h, w, targets)
    assert wanted == [False, True]


def test_no_tensor_of_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_LOGITS", 64 * 500)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    h, w = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (256, 500))
    with Watch():
        linear_cross_entropy(h, w, torch.randint(0, 500, (256,))).backward()
    assert largest <= 64 * 500


def test_a_target_outside_the_vocabulary_is_named() -> None:
    h, w = torch.randn(3, 4), torch.randn(10, 4)
    with pytest.raises(ValueError, match="target 10 is outside the vocabulary of 10"):
        linear_cross_entropy(h, w, torch.tensor([1, 10, -100]))
