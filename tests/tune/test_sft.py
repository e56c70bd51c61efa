"""Fine-tuning on answers: what each reduction divides by, whatever the micro-batches, and that it learns."""

from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, config, equal, weights
from tests.train.test_step import Gradients
from tests.train.tiny import tiny_model

from plait.data.conversations import Conversations
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.text.turns import Turns
from plait.train.loop import train
from plait.train.optim import Optim
from plait.train.step import update
from plait.tune.sft import SFT, Reduction


def talks(n: int = 64) -> list[Turns]:
    """A question of a few tokens; the answer repeats its first token, then 63."""
    found = []
    for i in range(n):
        asked = [i % 40 + 1, *(60 for _ in range(i % 4 + 1))]
        answer = [i % 40 + 1] * (i % 3 + 1) + [63]
        found.append(Turns(ids=(*asked, *answer), said=(False,) * len(asked) + (True,) * len(answer)))
    return found


def goal(reduction: Reduction = "mean", accumulate: int = 1) -> SFT:
    data = Conversations(talks(), batch_size=4, seq_len=24, seed=0)
    held_out = Conversations(talks(), batch_size=4, seq_len=24, seed=1, repeat=False)
    return SFT(data, reduction=reduction, accumulate=accumulate, validation=held_out, validation_batches=2)


def gradients(reduction: Reduction, accumulate: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Told loss, and the gradients of step 1."""
    objective, model = goal(reduction, accumulate), tiny_model()
    batches = objective.batches(1)
    sizes = [objective.size(batch) for batch in batches]
    counted = sum(size.counted for size in sizes)
    weight = sum(size.counted if size.weight is None else size.weight for size in sizes)
    seen = Gradients(model, Optim(clip=0.0))
    told = update(model, objective, batches, counted, seen, 1e-2, weight=weight)
    return told.loss, seen.seen


@pytest.mark.parametrize("reduction", ["mean", "sequence", "sum"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_divided_by_what_the_reduction_says(reduction: Reduction, accumulate: int) -> None:
    (batch,) = goal().batches(1)
    model: Hybrid = tiny_model()
    logits = model(batch.ids, starts=batch.starts).logits
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    counted = int((batch.targets != IGNORED).sum())
    talks_in_it = sum(
        bool((part != IGNORED).any())
        for row in range(4)
        for part in torch.tensor_split(batch.targets[row], batch.starts[row].nonzero()[1:, 0].tolist())
    )
    assert talks_in_it > 4
    divisor = {"mean": counted, "sequence": talks_in_it, "sum": 1}[reduction]
    (total / divisor).backward()
    loss, found = gradients(reduction, accumulate)
    assert loss == pytest.approx(float(total.detach()) / counted, rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=2e-4, atol=2e-5 * counted / divisor, msg=name)


def test_a_model_learns_to_answer_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole, first, second = tiny_model("M*-"), tiny_model("M*-"), tiny_model("M*-", seed=5)
    settings = config(steps=60, optim=Optim(clip=0.0))
    out = train(whole, goal("sum", accumulate=2), settings)
    assert out.validation_loss is not None and out.validation_loss < 1.0 < float(torch.tensor(64.0).log())
    with pytest.raises(KeyboardInterrupt):
        train(first, goal("sum", accumulate=2), settings, tmp_path, on_step=Stop(9))
    with pytest.raises(ValueError, match=r"reduction was 'sum' and is 'mean'"):
        train(second, goal("mean", accumulate=2), settings, tmp_path)
    train(second, goal("sum", accumulate=2), settings, tmp_path)
    assert equal(weights(whole), weights(second))
