"""Spikes: what the band lets through, bad batches left out, going back, stopping early, and all of it resumed."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, equal, steps_of, weights
from tests.train.tiny import tiny_model

from plait.config import ConfigError, from_dict
from plait.data.loader import Batch, Loader
from plait.data.shards import Dataset
from plait.model.hybrid import Hybrid
from plait.train.checkpoints import Progress
from plait.train.loop import DivergedError, Outcome, TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.objective import Loss
from plait.train.optim import Optim, Optimizers
from plait.train.pretrain import NextToken
from plait.train.schedule import Schedule
from plait.train.spikes import Snapshot, Spikes, Watch
from plait.train.step import update

SOON = Spikes(window=16, patience=3)


def told(watch: Watch, pairs: list[tuple[float, float]]) -> list[int]:
    """Which of (loss, norm) were refused."""
    return [i for i, (loss, norm) in enumerate(pairs) if not watch.accepts(loss, norm)]


def noisy(n: int, loss: float = 3.0, seed: int = 0) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(loss + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 0.3))) for _ in range(n)]


def test_the_band_is_median_and_mad() -> None:
    watch = Watch(Spikes(window=8, width=3.0))
    for loss, norm in zip(
        (5.0, 1.0, 2.0, 4.0, 3.0, 9.0, 3.5, 2.5), (1.0, 1.0, 4.0, 4.0, 2.0, 2.0, 2.0, 8.0), strict=True
    ):
        watch.settings = replace(watch.settings, action="off")
        watch.accepts(loss, norm)
    watch.settings = replace(watch.settings, action="skip")
    # median 3.25; distances .25 .25 .75 .75 1.25 1.75 2.25 5.75, their median 1
    # norms in powers of two: 0 0 1 1 1 2 2 3, median 1, distances 0 0 0 1 1 1 1 2, their median 1
    # the largest, which are p90 of eight: 9 and 3
    loss, norm = watch.limits()
    assert loss == pytest.approx(3.25 + 3 * max(1.4826 * 1.0, 5.75 / 1.2816))
    assert norm == pytest.approx(2 ** (1 + 3 * max(1.4826, 2 / 1.2816)))


def test_a_band_without_noise_still_has_a_width() -> None:
    watch = Watch(Spikes(window=8, width=5.0))
    told(watch, [(2.0, 1.0)] * 8)
    assert watch.limits() == (pytest.approx(2.0 + 5 * 0.04), pytest.approx(math.exp(5 * 0.25)))


def test_one_bad_batch_is_refused_and_leaves_the_band_alone() -> None:
    watch = Watch(SOON)
    assert told(watch, [*noisy(20), (9.0, 1.0), *noisy(20, seed=1), (3.0, 80.0)]) == [20, 41]
    assert len(watch.losses) == 16 and max(watch.losses) < 4


def test_nothing_is_judged_at_first() -> None:
    assert told(Watch(SOON), [(10.0, 1.0), (100.0, 50.0), *noisy(5), (50.0, 1.0)]) == []


def test_off_refuses_nothing() -> None:
    assert told(Watch(Spikes(action="off", window=16)), [*noisy(20), (90.0, 900.0)]) == []


def test_data_that_changed_are_taken_after_some_patience() -> None:
    watch = Watch(SOON)
    assert told(watch, [*noisy(20), *noisy(40, loss=5.0, seed=1), (9.0, 1.0)]) == [20, 21, 22, 60]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_curves_are_let_through(seed: int) -> None:
    # falling fast, noise that is skewed and of two kinds of text, norms with heavy tails
    rng, pairs = random.Random(seed), []
    for step in range(3000):
        loss = 2 + 8 * math.exp(-step / 60) + 2 / math.sqrt(1 + step / 50) + rng.expovariate(6)
        loss += 0.8 if rng.random() < 0.25 else 0.0
        pairs.append((loss, math.exp(rng.gauss(-0.5 * math.log1p(step / 100), 0.35))))
    watch = Watch(Spikes())
    assert told(watch, pairs) == [] and watch.verdict() == ""


def test_real_curves_are_let_through(shared: Path) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "train_tiny.json").read_text())
    losses = next(v for v in golden.values() if isinstance(v, list))
    watch = Watch(SOON)
    assert told(watch, [(float(x), 1.0) for x in losses]) == []


def test_a_loss_that_stays_high_is_a_divergence() -> None:
    settings = Spikes(action="off", diverged_above=1.0, diverged_for=10)
    watch = Watch(settings)
    told(watch, noisy(50))
    assert watch.verdict() == ""
    # the level is the median of 32: it is high after 17 of them, and must be so ten times
    told(watch, noisy(25, loss=4.5, seed=1))
    assert watch.verdict() == ""
    told(watch, noisy(2, loss=4.5, seed=2))
    assert "more than 1 above its best for 10 steps: 4.4" in watch.verdict() or "4.5" in watch.verdict()
    told(watch, noisy(30, seed=3))
    assert watch.verdict() == ""
    never = Watch(replace(settings, diverged_above=0.0))
    told(never, [*noisy(50), *noisy(90, loss=9.0)])
    assert never.verdict() == ""


def test_what_is_remembered_survives_json() -> None:
    pairs = [*noisy(30), (9.0, 1.0), (9.0, 1.0)]
    watch = Watch(SOON)
    told(watch, pairs)
    again = Watch(SOON, json.loads(json.dumps(watch.state())))
    assert again.state() == watch.state() and again.limits() == watch.limits() and again.streak == 2
    more = [(9.0, 1.0), (9.0, 1.0), *noisy(30, seed=2)]
    assert told(again, more) == told(watch, more) == [0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 4}, "window=4"),
        ({"width": 0}, "width=0"),
        ({"diverged_above": -1.0}, "diverged_above"),
        ({"action": "stop"}, "skip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Spikes, bad, "run.spikes")


class Bad(NextToken):
    """The draws in `bad` have random targets, and a loss `factor` times as large."""

    bad: tuple[int, ...] = ()
    factor = 1.0

    def batches(self, draw: int) -> list[Batch]:
        found = list(super().batches(draw))
        if draw in self.bad:
            g = torch.Generator().manual_seed(draw)
            found = [replace(b, targets=torch.randint(0, 62, b.targets.shape, generator=g)) for b in found]
            # a mark that no document bears
            found[0].targets[0, :3] = 61
        return found

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        good = super().loss(model, batch, scale)
        is_bad = bool((batch.targets[0, :3] == 61).all())
        return Loss(value=good.value * self.factor, tokens=good.tokens) if is_bad else good


def bad(words: Dataset, *draws: int, factor: float = 1.0, rows: int = 4, length: int = 24) -> Bad:
    data = {"words": words}
    valid = Loader(data, batch_size=16, seq_len=64, seed=1, repeat=False)
    goal = Bad(Loader(data, batch_size=rows, seq_len=length, seed=0), validation=valid, validation_batches=rows)
    goal.bad, goal.factor = draws, factor
    return goal


def config(steps: int = 120, **kwargs: object) -> TrainConfig:
    settings = {"steps": steps, "schedule": Schedule(peak=1e-2, warmup_steps=5, decay_steps=10), "spikes": SOON}
    return TrainConfig(**(settings | kwargs))  # type: ignore[arg-type]


def run(goal: NextToken, out: Path | None = None, seed: int = 0, **kwargs: object) -> tuple[Outcome, Hybrid]:
    model = tiny_model("M*-", seed=seed)
    return train(model, goal, config(**kwargs), out), model  # type: ignore[arg-type]


def test_bad_batches_cost_nothing_with_the_guard_and_much_without(words: Dataset) -> None:
    # during the decay, from which a run does not recover
    draws, sizes = (88, 90, 92, 94), {"factor": 30.0, "rows": 8, "length": 32}
    settings = {"steps": 100, "schedule": Schedule(peak=1e-2, warmup_steps=10, decay_steps=25)}
    clean, _ = run(bad(words, **sizes), **settings)  # type: ignore[arg-type]
    guarded, _ = run(bad(words, *draws, **sizes), **settings)  # type: ignore[arg-type]
    never = Spikes(action="off", diverged_above=0.0)
    without, _ = run(bad(words, *draws, **sizes), **settings, spikes=never)  # type: ignore[arg-type]
    assert clean.spikes == 0 and guarded.spikes == guarded.skipped == 4 and without.spikes == 0
    assert clean.validation_loss and guarded.validation_loss and without.validation_loss
    gap = [found.validation_loss / clean.validation_loss - 1 for found in (guarded, without)]
    # 0.1 % and 3.5 % were seen
    assert gap[0] < 0.005 < 0.02 < gap[1], gap


def test_spikes_are_counted_and_shown(words: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts: list[StepFacts] = []
    train(tiny_model("M*-"), bad(words, 60, factor=30.0), config(64), tmp_path, on_step=facts.append)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if not x["applied"]] == [60]
    assert lines[-1]["spikes"] == lines[-1]["skipped"] == 1
    assert "1 skipped (1 for spikes)" in facts[-1].line()
    assert "draw 60 of data is left out" in caplog.text


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("at", [61, 65, 75])
def test_a_guarded_run_resumes_bit_for_bit(words: Dataset, tmp_path: Path, action: str, at: int) -> None:
    guard = Spikes(action=action, window=16, patience=3, snapshot_every=25)  # type: ignore[arg-type]
    draws, settings = (60, 62, 63, 64, 65, 66, 90), {"spikes": guard, "steps": 100, "save_minutes": 0}
    one, whole = run(bad(words, *draws, factor=30.0), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        counter = iter(range(1000))
        stop = Stop(-1)
        train(
            tiny_model("M*-"),
            bad(words, *draws, factor=30.0),
            config(**settings),  # type: ignore[arg-type]
            tmp_path / "torn",
            on_step=lambda facts: stop(replace(facts, step=-1)) if next(counter) == at else None,
        )
    two, torn = run(bad(words, *draws, factor=30.0), tmp_path / "torn", seed=9, **settings)
    assert (one.spikes, one.rollbacks, one.skipped) == (two.spikes, two.rollbacks, two.skipped)
    assert one.rollbacks == (1 if action == "rollback" else 0) and one.spikes >= 5
    assert equal(weights(whole), weights(torn))
    kept = [
        [{k: v for k, v in json.loads(x).items() if k in ("step", "loss", "skipped", "applied")} for x in path.open()]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("whole", "torn"))
    ]
    assert kept[0] == kept[1]


def test_going_back_restores_the_state_and_draws_other_data(words: Dataset, tmp_path: Path) -> None:
    facts: list[StepFacts] = []
    kept: list[list[str]] = []
    guard = Spikes(action="rollback", window=16, patience=3, snapshot_every=20)
    goal = bad(words, 50, 51, 52, factor=30.0)
    settings = config(70, spikes=guard, save_every=9)

    def look(f: StepFacts) -> None:
        facts.append(f)
        kept.append(steps_of(tmp_path) if f.step >= 40 else [])

    outcome = train(tiny_model("M*-"), goal, settings, tmp_path, on_step=look)
    # 50 updates, three spikes, back to 40: 70 updates of 70 + 10 + 3 draws
    assert (outcome.steps, outcome.rollbacks, outcome.spikes, outcome.skipped) == (70, 1, 3, 13)
    assert [f.step for f in facts[48:56]] == [49, 50, 50, 50, 40, 41, 42, 43]
    # a resumed run must not begin where this one has left
    assert "step-000045" in kept[51] and kept[52] == ["step-000036", "step-000040"]
    assert [f.step + f.skipped for f in facts] == list(range(1, 84))
    assert "went back once" in facts[-1].line()
    assert steps_of(tmp_path) == ["step-000054", "step-000063", "step-000070"]


def test_a_snapshot_holds_weights_moments_and_progress(words: Dataset) -> None:
    model, goal = tiny_model("M*-"), bad(words)
    optimizers = Optimizers(model, Optim())
    progress = Progress(step=0, tokens=0, watch={"streak": 0})

    def three_updates() -> None:
        for _ in range(3):
            batches = goal.batches(progress.draws)
            update(model, goal, batches, sum(goal.size(b).counted for b in batches), optimizers, 1e-2)
            progress.step += 1

    three_updates()
    first = weights(model), {name: t.clone() for name, t in optimizers.tensors().items()}
    snapshot = Snapshot.take(model, optimizers, progress)
    three_updates()
    assert not equal(weights(model), first[0]) and not equal(optimizers.tensors(), first[1])
    progress.spikes, progress.skipped = 2, 2
    again = Snapshot.load(snapshot.tensors(), json.loads(json.dumps(snapshot.facts())), model.state_dict())
    for one in (snapshot, again):
        one.restore(model, optimizers, progress)
        assert equal(weights(model), first[0]) and equal(optimizers.tensors(), first[1])
        # eight draws were made: all but the three that count are left out
        assert (progress.step, progress.skipped, progress.spikes, one.tries) == (3, 5, 2, 1)
        three_updates()
        progress.skipped -= 3
    assert progress.rollbacks == 2


def test_what_a_run_went_back_to_is_kept_however_many_later_checkpoints_there_are(
    words: Dataset, tmp_path: Path
) -> None:
    kept: list[list[str]] = []
    guard = Spikes(action="rollback", window=16, patience=3, snapshot_every=20)
    settings = config(54, spikes=guard, save_every=2, keep=2)
    goal = bad(words, 50, 51, 52, factor=30.0)

    def look(facts: StepFacts) -> None:
        kept.append(steps_of(tmp_path) if facts.step > 2 else [])

    train(tiny_model("M*-"), goal, settings, tmp_path, on_step=look)
    # the first and the third spike
    assert kept[50] == ["step-000048", "step-000050"] and kept[52] == ["step-000040"]


def test_a_run_that_goes_back_in_vain_gives_up(words: Dataset) -> None:
    guard = Spikes(action="rollback", window=16, patience=2, snapshot_every=20)
    draws = [draw for draw in range(45, 300) if draw % 8 < 3]
    with pytest.raises(DivergedError, match="went back 3 times to step 40"):
        run(bad(words, *draws, factor=30.0), spikes=guard)


def test_data_that_have_changed_for_good_are_taken_where_going_back_does_not_help(words: Dataset) -> None:
    guard = Spikes(action="rollback", window=16, patience=2, snapshot_every=20, diverged_above=0.0)
    outcome, _ = run(bad(words, *range(45, 300), factor=30.0), spikes=guard)
    # two batches each before the first time and after the three
    assert (outcome.steps, outcome.rollbacks, outcome.spikes) == (120, 3, 8)


def test_a_diverging_run_is_stopped_with_its_last_checkpoint(words: Dataset, tmp_path: Path) -> None:
    guard = Spikes(action="off", diverged_above=1.0, diverged_for=5)
    schedule = Schedule(peak=1e-2, warmup_steps=5, decay_steps=0)
    goal = bad(words, *range(60, 400), factor=3.0)
    with pytest.raises(
        DivergedError, match=r"diverged: the loss has been more than 1 above.*step-0000\d\d.*Lower schedule.peak"
    ):
        run(goal, tmp_path, spikes=guard, steps=300, save_every=20, schedule=schedule)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 60 + 17 <= last < 100
