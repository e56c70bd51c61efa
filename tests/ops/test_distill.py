"""Distillation against the formulae in float64: values, gradients, temperature, left-out targets, memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import plait.ops.distill as module
from plait.ops.dispatch import use
from plait.ops.distill import distillation
from plait.ops.loss import linear_cross_entropy


def drawn(T: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, w, g, v of different widths, and targets of which a third is left out."""
    h, w, g, v = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((T, 5), (11, 5), (T, 7), (11, 7)))
    targets = torch.randint(0, 11, (T,))
    targets[1::3] = -100
    return h.requires_grad_(), w.requires_grad_(), g, v, targets


def by_hand(
    h: Tensor, w: Tensor, g: Tensor, v: Tensor, targets: Tensor, tau: float, share: float
) -> tuple[float, float, Tensor]:
    """Cross-entropy, divergence and d loss / d logits, token by token, in float64 and without autograd."""
    z, t = (h.detach().double() @ w.detach().double().T), (g.double() @ v.double().T)
    ce = kl = 0.0
    dz = torch.zeros_like(z)
    for i, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        p, q = torch.softmax(t[i] / tau, -1), torch.softmax(z[i] / tau, -1)
        hard = torch.softmax(z[i], -1)
        kl += tau**2 * float((p * (p.log() - q.log())).sum())
        ce -= float(hard[target].log())
        onehot = torch.zeros_like(hard)
        onehot[target] = 1.0
        dz[i] = share * tau * (q - p) + (1 - share) * (hard - onehot)
    return ce, kl, dz


@pytest.mark.parametrize("backend", ["sliced", "reference"])
@pytest.mark.parametrize(("tau", "share"), [(1.0, 1.0), (1.0, 0.25), (2.5, 1.0), (0.5, 0.6), (3.0, 0.0)])
@pytest.mark.parametrize("T", [1, 23])
def test_values_and_gradients_are_those_of_the_formulae(
    T: int, tau: float, share: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_LOGITS", 11 * 8)  # 8 tokens a slice
    monkeypatch.setattr(module, "BLOCK_LOGITS", 11 * 3)
    h, w, g, v, targets = drawn(T)
    ce, kl, dz = by_hand(h, w, g, v, targets, tau, share)
    with use(backend):
        found = distillation(h, w, g, v, targets, temperature=tau, share=share, scale=0.3)
    assert float(found.cross_entropy) == pytest.approx(0.3 * ce, rel=1e-12)
    assert float(found.divergence) == pytest.approx(0.3 * kl, rel=1e-12)
    assert float(found.loss.detach()) == pytest.approx(0.3 * (share * kl + (1 - share) * ce), rel=1e-12)
    assert not found.divergence.requires_grad and not found.cross_entropy.requires_grad
    dh, dw = torch.autograd.grad(found.loss * 2, (h, w))
    torch.testing.assert_close(dh, 0.6 * dz @ w.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dw, 0.6 * dz.T @ h.detach(), rtol=1e-12, atol=1e-14)


def test_without_the_teacher_it_is_cross_entropy_and_without_a_difference_nothing() -> None:
    h, w, g, v, targets = drawn(9, torch.float32)
    alone = distillation(h, w, g, v, targets, share=0.0)
    torch.testing.assert_close(alone.loss, linear_cross_entropy(h, w, targets))
    same = distillation(h, w, h, w, targets)
    assert float(same.loss) == pytest.approx(0.0, abs=1e-5)
    assert torch.autograd.grad(same.loss, h)[0].abs().max() < 1e-5
    assert float(distillation(h, w, g, v, targets).divergence) > 0.5


def test_neither_teacher_nor_a_frozen_head_gets_a_gradient() -> None:
    h, w, g, v, targets = drawn(9, torch.float32)
    g, v = g.requires_grad_(), v.requires_grad_()
    found = distillation(h, w.detach(), g, v, targets)
    exact = distillation(h, w, g, v, targets)
    torch.testing.assert_close(*(torch.autograd.grad(one.loss, h)[0] for one in (found, exact)))
    for backend in ("sliced", "reference"):
        with use(backend):
            distillation(h, w, g, v, targets).loss.backward()
    assert g.grad is None and v.grad is None and w.grad is not None
    with torch.no_grad():
        assert not distillation(h, w, g, v, targets).loss.requires_grad


def test_bfloat16_models_lose_no_more_than_their_logits_rounding() -> None:
    h, w, g, v, targets = drawn(64, torch.bfloat16)
    with use("reference"):
        exact = distillation(h.double(), w.double(), g.double(), v.double(), targets, temperature=2.0, share=0.5)
    found = distillation(h, w, g, v, targets, temperature=2.0, share=0.5)
    assert found.loss.dtype == torch.float32
    # logits of size 8 are rounded to 2^-6
    assert float(found.loss) == pytest.approx(float(exact.loss), rel=5e-3)
    theirs, ours = torch.autograd.grad(exact.loss, h)[0], torch.autograd.grad(found.loss, h)[0]
    assert float((theirs - ours).float().norm() / theirs.float().norm()) < 2e-2


def test_no_tensor_of_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_LOGITS", 64 * 500)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    h, w, g, v = (torch.randn(n, 8).bfloat16() for n in (256, 500, 256, 500))
    with Watch():
        distillation(h.requires_grad_(), w.requires_grad_(), g, v, torch.randint(500, (256,))).loss.backward()
    assert largest <= 64 * 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"share": 1.5}, "share=1.5: the divergence's part"),
        ({"v": torch.randn(12, 7)}, "over a vocabulary of 11, teacher .* over 12"),
        ({"g": torch.randn(8, 7)}, "must have read the same tokens"),
        ({"targets": torch.full((9,), 11)}, "target 11 is outside the vocabulary of 11"),
    ],
)
@pytest.mark.parametrize("backend", ["sliced", "reference"])
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str, backend: str) -> None:
    given = dict(zip(("h", "w", "g", "v", "targets"), drawn(9, torch.float32), strict=True))
    with use(backend), pytest.raises(ValueError, match=words):
        distillation(**(given | change))  # type: ignore[arg-type]
