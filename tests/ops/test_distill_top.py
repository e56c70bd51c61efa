"""Distillation from kept answers against the formulae in float64, and against the whole distribution."""

import pytest
import torch
from torch import Tensor

import plait.ops.distill as module
from plait.ops.dispatch import use
from plait.ops.distill import distillation
from plait.ops.distill_top import top_distillation

V = 11


def drawn(T: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, w, the teacher's logits, and targets of which a third is left out."""
    h, w, z = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((T, 5), (V, 5), (T, V)))
    targets = torch.randint(0, V, (T,))
    targets[1::3] = -100
    return h.requires_grad_(), w.requires_grad_(), 2 * z, targets


def kept(z: Tensor, k: int, tau: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log_p and log_rest of the k likeliest tokens."""
    log_p = (z / tau).log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    return ids.int(), top, log_p.scatter(1, ids, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("backend", ["sliced", "reference"])
@pytest.mark.parametrize(("tau", "share"), [(1.0, 1.0), (2.5, 0.25), (0.5, 1.0)])
@pytest.mark.parametrize(("T", "k"), [(1, 1), (23, 4), (23, 10), (5, 11)])
def test_values_and_gradients_are_those_of_the_formulae(
    T: int, k: int, tau: float, share: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_LOGITS", V * 8)  # 8 tokens a slice
    monkeypatch.setattr(module, "BLOCK_LOGITS", V * 3)
    h, w, teacher, targets = drawn(T)
    z, ce, kl, dz = h.detach() @ w.detach().T, 0.0, 0.0, torch.zeros(T, V, dtype=torch.float64)
    for t, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        p, q, hard = (torch.softmax(x, -1) for x in (teacher[t] / tau, z[t] / tau, z[t]))
        best = p.topk(k).indices
        tail = torch.ones(V, dtype=torch.bool).index_fill_(0, best, False)
        taught = p.clone()
        kl += tau**2 * float((p[best] * (p[best].log() - q[best].log())).sum())
        if k < V:
            p_rest, q_rest = p[tail].sum(), q[tail].sum()
            kl += tau**2 * float(p_rest * (p_rest.log() - q_rest.log()))
            taught[tail] = p_rest * q[tail] / q_rest
        ce -= float(hard[target].log())
        hard[target] -= 1
        dz[t] = share * tau * (q - taught) + (1 - share) * hard
    with use(backend):
        found = top_distillation(h, w, *kept(teacher, k, tau), targets, temperature=tau, share=share, scale=0.3)
    assert float(found.cross_entropy) == pytest.approx(0.3 * ce, rel=1e-12)
    assert float(found.divergence) == pytest.approx(0.3 * kl, rel=1e-11)
    assert float(found.loss.detach()) == pytest.approx(0.3 * (share * kl + (1 - share) * ce), rel=1e-11)
    dh, dw = torch.autograd.grad(found.loss * 2, (h, w))
    torch.testing.assert_close(dh, 0.6 * dz @ w.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dw, 0.6 * dz.T @ h.detach(), rtol=1e-10, atol=1e-13)


def test_it_never_exceeds_the_whole_divergence_and_grows_into_it() -> None:
    h, w, teacher, targets = drawn(64)
    g, v = torch.linalg.lstsq(torch.eye(V, dtype=torch.float64), teacher.T).solution.T, torch.eye(V).double()
    whole = float(distillation(h, w, g, v, targets).divergence)
    found = [float(top_distillation(h, w, *kept(teacher, k), targets).divergence) for k in range(1, V + 1)]
    assert all(a <= b + 1e-12 for a, b in zip(found, found[1:], strict=False))
    assert 0 < found[0] < found[-2] <= found[-1] == pytest.approx(whole, rel=1e-12)


def test_a_student_that_agrees_loses_nothing_and_rounded_answers_cost_little() -> None:
    h, w, _, targets = drawn(64, torch.float32)
    ids, log_p, log_rest = kept((h @ w.T).detach(), 4)
    same = top_distillation(h, w, ids, log_p.half(), log_rest.half(), targets)
    assert 0 <= float(same.divergence) < 1e-5 * 64
    # float16 keeps three digits of a logarithm
    assert torch.autograd.grad(same.loss, h)[0].abs().max() < 5e-3
    sure = top_distillation(h, w, ids, log_p, torch.full_like(log_rest, -torch.inf), targets)
    assert float(sure.divergence) > 0 and torch.isfinite(torch.autograd.grad(sure.loss, h)[0]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"share": 1.5}, "share=1.5: the divergence's part"),
        ({"ids": torch.full((9, 2), V)}, "token 11 is outside the student's vocabulary of 11"),
        ({"log_rest": torch.zeros(8)}, "the student read 9 tokens"),
        ({"targets": torch.full((9,), V)}, "target 11 is outside"),
    ],
)
@pytest.mark.parametrize("backend", ["sliced", "reference"])
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str, backend: str) -> None:
    h, w, teacher, targets = drawn(9, torch.float32)
    ids, log_p, log_rest = kept(teacher, 2)
    given = {"h": h, "w": w, "ids": ids, "log_p": log_p, "log_rest": log_rest, "targets": targets}
    with use(backend), pytest.raises(ValueError, match=words):
        top_distillation(**(given | change))  # type: ignore[arg-type]
