"""Elastic models: slices take what was trained, bit for bit; gradients reach the whole; runs resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, config, equal, weights
from tests.train.tiny import objective, tiny_model

from plait.compress.elastic import WHOLE, Elastic, Sizes, takes
from plait.compress.plan import Plan, shrunk
from plait.compress.prune import prune
from plait.compress.score import Scores, score
from plait.config import ConfigError
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint, load, save
from plait.model.hybrid import Hybrid
from plait.train.loop import train
from plait.train.objective import mean_loss

PATTERN = "M-*-M-"


@pytest.fixture
def teacher() -> Hybrid:
    return tiny_model(PATTERN, seed=3)


@pytest.fixture
def checkpoint(teacher: Hybrid, tmp_path: Path) -> Checkpoint:
    save(teacher, tmp_path / "teacher", format="native")
    return Checkpoint.open(tmp_path / "teacher")


@pytest.fixture
def sizes(teacher: Hybrid, words: Dataset) -> Sizes:
    batches = [objective(words).batches(i)[0] for i in range(2)]
    scores = score(teacher, batches)
    narrow = {"M": {"n_heads": 2, "head_dim": 6}, "-": {"d_ff": 40}}
    plans = {
        "large": shrunk(teacher.config, sizes={"-": {"d_ff": 48}}),
        "middle": shrunk(teacher.config, (0, 1, 2, 3, 5), d_model=24, sizes=narrow),
        "small": shrunk(teacher.config, (0, 1, 2, 3), d_model=16, sizes={**narrow, "-": {"d_ff": 16}}),
    }
    return Sizes(plans, scores)


def test_the_takes_of_a_plan_are_what_its_cut_takes(checkpoint: Checkpoint, sizes: Sizes) -> None:
    for name, plan in sizes.plans.items():
        cut = sizes.slice(checkpoint, name)
        found = takes(checkpoint, plan, sizes.scores)
        assert set(found) == set(cut.tensors)
        for at, take in found.items():
            assert torch.equal(take.of(checkpoint.tensors[take.source].read()), cut.tensors[at].read()), (name, at)


def test_what_is_trained_is_what_is_sliced_out(
    teacher: Hybrid, checkpoint: Checkpoint, sizes: Sizes, words: Dataset, tmp_path: Path
) -> None:
    goal = objective(words)
    elastic = Elastic(goal, tiny_model(PATTERN, seed=3), checkpoint, sizes, seed=1)
    (batch,) = elastic.batches(0)
    found = elastic.loss(teacher, batch, 0.1)
    found.value.backward()
    grads = {name: p.grad for name, p in teacher.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    # the same by hand: each slice as a model of its own
    total = 0.0
    for name in batch.sizes:
        alone = sizes.slice(checkpoint, name).model(recipe="fp32", dtype="float32")
        x, _ = alone.hidden(batch.batch.ids, starts=batch.batch.starts)
        y, _ = elastic.teacher.hidden(batch.batch.ids, starts=batch.batch.starts)
        one = alone.taught_sum(x, batch.batch.targets, elastic.teacher, y, scale=0.1)
        assert float(found.metrics[f"{name} divergence"]) == pytest.approx(float(one.divergence), rel=1e-5, abs=1e-6)
        total += float(one.divergence)
    assert float(found.value.detach()) == pytest.approx(total / len(batch.sizes), rel=1e-5)


def test_every_step_has_the_whole_the_smallest_and_one_between(
    checkpoint: Checkpoint, sizes: Sizes, teacher: Hybrid, words: Dataset
) -> None:
    elastic = Elastic(objective(words), teacher, checkpoint, sizes, seed=1)
    drawn = [elastic.names(draw) for draw in range(40)]
    assert all(names[0] == WHOLE and names[-1] == "small" and len(names) == 3 for names in drawn)
    assert {names[1] for names in drawn} == {"large", "middle"}
    assert drawn == [elastic.names(draw) for draw in range(40)]
    two = Sizes({"small": sizes.plans["small"]}, sizes.scores)
    assert Elastic(objective(words), teacher, checkpoint, two).names(0) == (WHOLE, "small")


def test_slices_learn_in_one_run_and_a_killed_run_ends_with_the_same_bits(
    checkpoint: Checkpoint, sizes: Sizes, words: Dataset, tmp_path: Path
) -> None:
    taught = tiny_model(PATTERN, seed=3)
    train(taught, objective(words), config(steps=40))
    save(taught, tmp_path / "taught", format="native")
    source = Checkpoint.open(tmp_path / "taught")

    def goal() -> Elastic:
        return Elastic(objective(words), load(tmp_path / "taught"), source, sizes, seed=1)

    def begin() -> Hybrid:
        return load(tmp_path / "taught", dtype="float32", recipe="fp32")

    def losses(at: Path) -> list[float]:
        plain = objective(words)
        opened = Checkpoint.open(at)
        models = (Sizes.open(at).slice(opened, name).model() for name in (WHOLE, *sizes.plans))
        return [mean_loss(model, plain, plain.validation()) for model in models]

    whole, first, second = begin(), begin(), begin()
    train(whole, goal(), config(steps=30))
    with pytest.raises(KeyboardInterrupt):
        train(first, goal(), config(steps=30), tmp_path / "run", on_step=Stop(11))
    train(second, goal(), config(steps=30), tmp_path / "run")
    assert equal(weights(whole), weights(second))
    sizes.save(tmp_path / "taught")
    save(whole, tmp_path / "elastic", format="native")
    sizes.save(tmp_path / "elastic")
    before, after = losses(tmp_path / "taught"), losses(tmp_path / "elastic")
    # the whole and what differs little from it lose little, the others come close
    assert max(after[:2]) < before[0] + 0.1
    assert before[2] > before[0] + 0.8 > after[2] + 0.6 and after[3] < before[0] + 0.4 < before[3] - 1


def test_a_slice_is_a_checkpoint_and_what_cannot_be_sliced_is_refused(
    checkpoint: Checkpoint, sizes: Sizes, teacher: Hybrid, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is no elastic model"):
        Sizes.open(checkpoint.folder)
    sizes.save(checkpoint.folder)
    again = Sizes.open(checkpoint.folder)
    assert again.plans == sizes.plans
    cut = again.slice(checkpoint, "middle")
    cut.save(tmp_path / "middle", "native", verify=False)
    assert equal(weights(load(tmp_path / "middle")), weights(cut.model()))
    with pytest.raises(ConfigError, match="did you mean 'middle'"):
        again.slice(checkpoint, "midle")
    with pytest.raises(ValueError, match="plans is empty"):
        Sizes({}, sizes.scores)
    # one key/value head for all is an average of both
    averaged = shrunk(teacher.config, sizes={"*": {"n_kv_heads": 1}})
    with pytest.raises(ValueError, match="would be averages"):
        takes(checkpoint, averaged, sizes.scores)
    replaced = replace(sizes.plans["small"], replaced={0: tmp_path / "none"})
    assert isinstance(replaced, Plan) and isinstance(sizes.scores, Scores)
    with pytest.raises((ValueError, OSError)):
        prune(checkpoint, replaced, sizes.scores)
