"""The loop: resuming bit for bit, stopping, giving up, keeping checkpoints, and learning."""

import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tests.train.tiny import objective, tiny_model
from torch import Tensor

from plait.data.loader import Batch
from plait.data.shards import Dataset
from plait.dist import state
from plait.formats.checkpoint import load
from plait.model.hybrid import Hybrid
from plait.train.loop import DivergedError, TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.objective import Loss
from plait.train.optim import Optim
from plait.train.pretrain import NextToken
from plait.train.schedule import Schedule

SCHEDULE = Schedule(peak=1e-2, warmup_steps=2, decay_steps=4)
GOLDEN = Path(__file__).parents[1] / "golden" / "train_tiny.json"


def config(steps: int = 12, **kwargs: object) -> TrainConfig:
    return TrainConfig(**({"steps": steps, "schedule": SCHEDULE, "validate_every": 5} | kwargs))  # type: ignore


def weights(model: Hybrid) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


class Stop:
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, facts: StepFacts) -> None:
        if facts.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(
    words: Dataset, tmp_path: Path, kind: str, accumulate: int
) -> None:
    settings = config(optim=Optim(kind=kind))  # type: ignore[arg-type]
    whole, first, second = tiny_model("ME*-"), tiny_model("ME*-"), tiny_model("ME*-", seed=5)
    facts: dict[str, list[StepFacts]] = {"whole": [], "torn": []}
    one = train(whole, objective(words, accumulate=accumulate), settings, on_step=facts["whole"].append)
    with pytest.raises(KeyboardInterrupt):
        stop = Stop(7)
        train(
            first,
            objective(words, accumulate=accumulate),
            settings,
            tmp_path,
            on_step=lambda f: (facts["torn"].append(f), stop(f)) and None,
        )
    assert steps_of(tmp_path) == ["step-000007"]
    two = train(second, objective(words, accumulate=accumulate), settings, tmp_path, on_step=facts["torn"].append)
    assert equal(weights(whole), weights(second))
    for name in ("loss", "lr", "grad_norm", "validation_loss", "tokens", "skipped"):
        assert [getattr(f, name) for f in facts["whole"]] == [getattr(f, name) for f in facts["torn"]], name
    assert (one.loss, one.validation_loss, one.tokens, one.steps) == (
        two.loss,
        two.validation_loss,
        two.tokens,
        two.steps,
    )
    moments, _ = state.read(tmp_path / "checkpoints" / "step-000012")
    assert all(torch.isfinite(tensor).all() for tensor in moments["optimizer"].values())


def test_the_generators_state_is_resumed_too(words: Dataset, tmp_path: Path) -> None:
    draws: list[float] = []

    def draw(facts: StepFacts) -> None:
        draws.append(float(torch.rand(())))

    train(tiny_model(), objective(words), config(6), on_step=draw)
    whole, draws = draws.copy(), draws
    draws.clear()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), objective(words), config(6), tmp_path, on_step=lambda f: (draw(f), Stop(3)(f)) and None)
    torch.manual_seed(99)
    train(tiny_model(), objective(words), config(6), tmp_path, on_step=draw)
    assert whole == draws


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_interrupts(words: Dataset, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"{signal.Signals(number).name} after step 3"):
        train(tiny_model(), objective(words), config(), tmp_path, on_step=Stop(3, number))
    assert steps_of(tmp_path) == ["step-000003"]
    assert signal.getsignal(number) == before


def test_a_signal_without_a_folder_interrupts(words: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), objective(words), config(), on_step=Stop(3))


def test_a_checkpoint_is_a_model_that_loads(words: Dataset, tmp_path: Path) -> None:
    model = tiny_model()
    outcome = train(model, objective(words), config(), tmp_path)
    assert outcome.checkpoint == tmp_path / "checkpoints" / "step-000012"
    assert equal(weights(load(outcome.checkpoint / "model", device="cpu")), weights(model))


class Sick(NextToken):
    """The draws in `bad` have a loss that is not a number."""

    bad: tuple[int, ...] = ()

    def batches(self, draw: int) -> list[Batch]:
        self.drawn = [*getattr(self, "drawn", []), draw]
        batches = list(super().batches(draw))
        if draw in self.bad:
            # marks the batch without changing what is counted
            batches = [Batch(ids=torch.zeros_like(b.ids), targets=b.targets, starts=b.starts) for b in batches]
        return batches

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        good = super().loss(model, batch, scale)
        return good if batch.ids.any() else Loss(value=good.value * float("inf"), tokens=good.tokens)


def sick(words: Dataset, *bad: int) -> Sick:
    goal = Sick(objective(words).loader)
    goal.bad = bad
    return goal


def test_a_skipped_step_keeps_the_schedule_and_takes_the_next_batch(words: Dataset, tmp_path: Path) -> None:
    facts: list[StepFacts] = []
    outcome = train(tiny_model(), sick(words, 2, 3, 6), config(8), tmp_path, on_step=facts.append)
    assert (outcome.steps, outcome.skipped) == (8, 3)
    assert [f.applied for f in facts] == [draw not in (2, 3, 6) for draw in range(11)]
    applied = [f.lr for f in facts if f.applied]
    assert applied == [SCHEDULE.lr(step, 8) for step in range(8)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["loss"] == "inf"


def test_skipped_steps_are_remembered_by_a_resumed_run(words: Dataset, tmp_path: Path) -> None:
    whole, second = tiny_model(), tiny_model(seed=3)
    train(whole, sick(words, 2, 6), config(8))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), sick(words, 2, 6), config(8), tmp_path, on_step=Stop(4))
    goal = sick(words, 2, 6)
    outcome = train(second, goal, config(8), tmp_path)
    assert outcome.skipped == 2 and goal.drawn[0] == 5
    assert equal(weights(whole), weights(second))


def test_a_run_of_bad_steps_stops_and_names_the_last_good_checkpoint(words: Dataset, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(DivergedError, match=r"3 steps in a row .*step-000004"):
        train(model, sick(words, 5, 6, 7), config(max_skipped=3, save_every=2), tmp_path)
    good = load(tmp_path / "checkpoints" / "step-000004" / "model", device="cpu")
    assert all(torch.isfinite(p).all() for p in [*model.parameters(), *good.parameters()])


def test_only_the_newest_checkpoints_stay(words: Dataset, tmp_path: Path) -> None:
    train(tiny_model(), objective(words), config(save_every=3, keep=2), tmp_path)
    assert steps_of(tmp_path) == ["step-000009", "step-000012"]


def test_broken_checkpoints_are_passed_over(words: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(save_every=2, keep=9)
    train(tiny_model(), objective(words), settings, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step-000012" / "complete.json").unlink()
    with (folder / "step-000010" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(1000)
    damaged = folder / "step-000008" / "model" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    (folder / ".step-000014.77.new").mkdir()
    before = tiny_model(seed=8)
    with caplog.at_level(logging.INFO):
        train(before, objective(words), settings, tmp_path)
    assert "resuming from" in caplog.text and "step-000006" in caplog.text
    whole = tiny_model()
    train(whole, objective(words), settings)
    assert equal(weights(whole), weights(before))
    assert not (folder / ".step-000014.77.new").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optim": Optim(weight_decay=0.2)}, "optim.weight_decay was 0.1 and is 0.2"),
        ({"schedule": Schedule(peak=2e-2, warmup_steps=2, decay_steps=4)}, "learning rate of step 1 was 0.005"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_what_differs(
    words: Dataset, tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), objective(words), config(), tmp_path, on_step=Stop(5))
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        train(tiny_model(), objective(words), config(**changed), tmp_path)
    with pytest.raises(ValueError, match="data.seed was 0 and is 1"):
        train(tiny_model(), objective(words, seed=1), config(), tmp_path)
    with pytest.raises(ValueError, match="model.pattern"):
        train(tiny_model("M-M-"), objective(words), config(), tmp_path)
    with pytest.raises(ValueError, match="never"):
        train(tiny_model(), objective(words), config(), tmp_path, resume="never")
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_a_run_may_become_longer_while_its_rate_is_at_the_peak(words: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), objective(words), config(12), tmp_path, on_step=Stop(8))
    whole, longer = tiny_model(), tiny_model(seed=4)
    train(whole, objective(words), config(16))
    train(longer, objective(words), config(16), tmp_path)
    assert equal(weights(whole), weights(longer))
    with pytest.raises(ValueError, match="learning rate of step 13"):
        train(tiny_model(), objective(words), config(20), tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_other_file(
    words: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = state.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "step-000006" in str(path):
            raise state.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train(tiny_model(), objective(words), config(save_every=3), tmp_path)
    assert caught.value.errno == errno.ENOSPC and "step-000006" in caught.value.filename
    assert steps_of(tmp_path) == ["step-000003"]
    monkeypatch.undo()
    whole, resumed = tiny_model(), tiny_model(seed=2)
    train(whole, objective(words), config(save_every=3))
    train(resumed, objective(words), config(save_every=3), tmp_path)
    assert equal(weights(whole), weights(resumed))


def test_metrics_of_steps_that_were_lost_are_cut(words: Dataset, tmp_path: Path) -> None:
    train(tiny_model(), objective(words), config(save_every=4, keep=9), tmp_path)
    for name in ("step-000008", "step-000012"):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(tiny_model(), objective(words), config(save_every=4, keep=9), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_validation_happens_when_it_is_due_and_at_the_end(words: Dataset) -> None:
    facts: list[StepFacts] = []
    outcome = train(tiny_model(), objective(words), config(12), on_step=facts.append)
    assert [f.step for f in facts if f.validation_loss is not None] == [5, 10, 12]
    assert outcome.validation_loss == facts[-1].validation_loss


def test_bf16_training_lowers_the_loss_far_below_that_of_a_uniform_guess(words: Dataset) -> None:
    outcome = train(tiny_model(recipe="bf16"), objective(words), config(60))
    # ln 64 = 4.16
    assert outcome.validation_loss is not None and outcome.validation_loss < 2.0


def test_the_first_fifty_losses_are_those_on_record(words: Dataset) -> None:
    facts: list[StepFacts] = []
    train(tiny_model("ME*-M-"), objective(words), config(50), on_step=facts.append)
    golden = json.loads(GOLDEN.read_text())
    # rounding differs between machines and grows from step to step; a real change of the method is far larger
    assert [f.loss for f in facts] == pytest.approx(golden["losses"], rel=5e-3)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"keep": 0}, {"save_every": -1}, {"save_minutes": -0.5}])
def test_settings_that_make_no_sense_are_named(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainConfig(**({"steps": 10} | settings))  # type: ignore[arg-type]
