"""One update: accumulation, clipping, and steps that must leave no trace."""

from collections.abc import Sequence

import pytest
import torch
from tests.train.tiny import objective, tiny_model
from torch import Tensor

from plait.data.loader import Batch
from plait.data.shards import Dataset
from plait.model.hybrid import Hybrid
from plait.train.objective import Loss
from plait.train.optim import Optim, Optimizers
from plait.train.pretrain import NextToken
from plait.train.step import Update, update


def one_update(model: Hybrid, goal: NextToken, batches: Sequence[Batch], **optim: float) -> tuple[Update, Optimizers]:
    optimizers = Optimizers(model, Optim(**optim))  # type: ignore[arg-type]
    counted = sum(goal.size(batch).counted for batch in batches)
    return update(model, goal, batches, counted, optimizers, 1e-2), optimizers


def unequal(batch: Batch) -> Batch:
    """Rows that count very different numbers of tokens."""
    targets = batch.targets.clone()
    targets[0, 1:] = -100
    targets[2, ::2] = -100
    return Batch(ids=batch.ids, targets=targets, starts=batch.starts)


class Gradients(Optimizers):
    """Keeps the gradients that an update would apply, and applies none."""

    def step(self, lr: float, decay: float = 1.0) -> None:
        self.seen = {self.names[p]: p.grad.clone() for p in self.parameters if p.grad is not None}  # type: ignore


def test_accumulation_over_unequal_batches_equals_one_large_batch(words: Dataset) -> None:
    goal, model = objective(words), tiny_model("ME*-")
    (whole,) = goal.batches(0)
    whole = unequal(whole)
    counted = goal.size(whole).counted
    seen: list[dict[str, Tensor]] = []
    results = []
    for parts in (1, 2, 4):
        gradients = Gradients(model, Optim(clip=0.0))
        results.append(update(model, goal, whole.split(parts), counted, gradients, 1e-2))
        seen.append(gradients.seen)
    for result, gradients in zip(results[1:], seen[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, seen[0][name], rtol=0, atol=1e-6, msg=name)


def test_the_loss_is_the_mean_over_counted_tokens(words: Dataset) -> None:
    goal, model = objective(words), tiny_model()
    (batch,) = goal.batches(3)
    result, _ = one_update(model, goal, [batch])
    fresh = tiny_model()
    with torch.no_grad():
        logits = fresh(batch.ids, starts=batch.starts).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert result.loss == pytest.approx(float(expected), rel=1e-6)


def test_clipping_bounds_the_norm_of_the_whole_gradient(words: Dataset) -> None:
    goal, model = objective(words), tiny_model()
    (batch,) = goal.batches(0)
    for clip in (0.01, 1e9):
        gradients = Gradients(model, Optim(clip=clip))
        result = update(model, goal, [batch], goal.size(batch).counted, gradients, 1e-2)
        norm = float(torch.stack([g.norm() for g in gradients.seen.values()]).norm())
        assert norm == pytest.approx(min(clip, result.grad_norm), rel=1e-5)


class Broken(NextToken):
    """A next-token objective whose loss or gradient is spoilt."""

    how = "loss"

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        good = super().loss(model, batch, scale)
        if self.how == "loss":
            return Loss(value=good.value * float("nan"), tokens=good.tokens)
        # a finite loss whose gradient is not: the derivative of sqrt at 0
        bad = (model.blocks[0].norm.weight.sum() * 0).sqrt()  # type: ignore[union-attr]
        return Loss(value=good.value + bad, tokens=good.tokens)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(words: Dataset, how: str, kind: str) -> None:
    goal, model = objective(words), tiny_model()
    _, optimizers = one_update(model, goal, goal.batches(0), kind=kind)  # type: ignore[arg-type]
    before = {**model.state_dict(), **optimizers.tensors()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    broken = Broken(goal.loader)
    broken.how = how
    result = update(model, broken, goal.batches(1), 1, optimizers, 1e-2)
    assert not result.applied
    after = {**model.state_dict(), **optimizers.tensors()}
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_takes_only_so_much_of_the_weight_decay(words: Dataset, kind: str) -> None:
    goal = objective(words)
    (batch,) = goal.batches(0)
    counted, moved = goal.size(batch).counted, {}
    for decay in (0.0, 0.5, 1.0):
        model = tiny_model()
        optimizers = Optimizers(model, Optim(kind=kind, weight_decay=0.5))  # type: ignore[arg-type]
        # what one update did must not stay for the next
        update(model, goal, [batch], counted, optimizers, 0.0, decay=0.25)
        update(model, goal, [batch], counted, optimizers, 1e-2, decay=decay)
        moved[decay] = {name: p.detach().clone() for name, p in model.named_parameters()}
    fresh = dict(tiny_model().named_parameters())
    for name, still in moved[0.0].items():
        for decay in (0.5, 1.0):
            lost = 1e-2 * 0.5 * decay * fresh[name].detach() if still.ndim > 1 else torch.zeros_like(still)
            torch.testing.assert_close(still - moved[decay][name], lost, rtol=0, atol=3e-7, msg=name)


def test_a_sum_makes_gradients_larger_and_tells_the_same_mean_loss(words: Dataset) -> None:
    goal, model = objective(words), tiny_model()
    (batch,) = goal.batches(0)
    counted, seen = goal.size(batch).counted, []
    for weight in (None, 2.0):
        gradients = Gradients(model, Optim(clip=0.0))
        result = update(model, goal, [batch], counted, gradients, 1e-2, weight=weight)
        seen.append((result.loss, result.grad_norm, gradients.seen))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    assert seen[1][1] == pytest.approx(seen[0][1] * counted / 2, rel=1e-5)
    for name, gradient in seen[0][2].items():
        torch.testing.assert_close(seen[1][2][name], gradient * counted / 2, rtol=1e-4, atol=1e-5, msg=name)
