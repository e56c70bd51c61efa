"""Runs in few bits: resumed and recomputed bit for bit, whatever is rounded by chance, and switched late."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, equal, weights
from tests.train.tiny import SIZES, objective

from plait.data.shards import Dataset
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.precision import RECIPES
from plait.precision.recipe import Gradual, PrecisionRecipe, Switch
from plait.train.loop import TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.objective import mean_loss
from plait.train.schedule import Schedule

# rows of the input projection are a multiple of 16
WIDE = SIZES | {"mamba2": {"n_heads": 16, "head_dim": 4, "d_state": 8, "n_groups": 2, "chunk": 8}}
NVFP4 = replace(RECIPES["nvfp4"], name="nvfp4 switched", switch=Switch(at=0.75, what="forward"), base="nvfp4")


def model(recipe: PrecisionRecipe = NVFP4, seed: int = 0) -> Hybrid:
    sizes = {name: value for name, value in WIDE.items() if name != "moe"}
    return build(ModelConfig.from_pattern("M-*-", **sizes), recipe, seed=seed)


def config(**changed: object) -> TrainConfig:
    return TrainConfig(**({"steps": 8, "schedule": Schedule(peak=1e-2, warmup_steps=2), "save_minutes": 0.0} | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [3, 7])
def test_a_killed_run_in_nvfp4_ends_with_the_same_bits(words: Dataset, tmp_path: Path, stop: int) -> None:
    """Before and after the late switch, with two micro-batches a step."""
    whole, first, second = model(), model(), model(seed=5)
    train(whole, objective(words, accumulate=2), config(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        train(first, objective(words, accumulate=2), config(), tmp_path, seed=1, on_step=Stop(stop))
    train(second, objective(words, accumulate=2), config(), tmp_path, seed=1)
    assert equal(weights(whole), weights(second))


def test_recomputed_blocks_round_as_they_did(words: Dataset) -> None:
    plain, again = model(), model()
    train(plain, objective(words), config(steps=3), seed=1)
    train(again, objective(words), config(steps=3, recompute=True), seed=1)
    assert equal(weights(plain), weights(again))


def test_the_seed_decides_what_chance_does(words: Dataset, tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        found.append(model())
        train(found[-1], objective(words), config(steps=2), tmp_path / f"{len(found)}", seed=seed)
    assert equal(weights(found[0]), weights(found[1])) and not equal(weights(found[0]), weights(found[2]))
    with pytest.raises(ValueError, match=r"rounding_seed was 2 and is 3"):
        train(model(), objective(words), config(steps=4), tmp_path / "3", seed=3)


def test_another_precision_is_another_run(words: Dataset, tmp_path: Path) -> None:
    train(model(RECIPES["ternary"]), objective(words), config(steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"precision was 'ternary' and is 'nvfp4'"):
        train(model(RECIPES["nvfp4"]), objective(words), config(steps=4), tmp_path)
    train(model(NVFP4), objective(words), config(steps=4), tmp_path / "b")
    with pytest.raises(ValueError, match=r"switch_step was 3 and is 6"):
        train(model(NVFP4), objective(words), config(steps=8), tmp_path / "b")


def test_the_switch_comes_when_it_says_and_micro_batches_draw_apart(words: Dataset) -> None:
    m, late, parts, draws = model(), [], set(), []

    def look(facts: StepFacts) -> None:
        late.append(m.moment.is_late)
        draws.append(m.moment.draw)
        parts.add(m.moment.part)

    train(m, objective(words, accumulate=2), config(), seed=1, on_step=look)
    assert late == [False] * 6 + [True] * 2 and draws == list(range(8)) and parts == {1}
    x = torch.randn(2, 16, 32)
    up = m.get_submodule("blocks.1.mixer.up_proj").requires_grad_(False)
    torch.testing.assert_close(up(x), x @ up.weight.t())  # type: ignore[operator]
    m.moment.is_late = False
    assert float((up(x) - x @ up.weight.t()).norm() / up(x).norm()) > 0.02  # type: ignore[operator]


GRADUAL = replace(RECIPES["ternary"], name="ternary by and by", gradual=Gradual(until=0.5), base="ternary")


def test_weights_become_ternary_by_and_by_and_a_killed_run_goes_on_so(words: Dataset, tmp_path: Path) -> None:
    whole, first, second, shares = model(GRADUAL), model(GRADUAL), model(GRADUAL, seed=5), []
    losses: list[float | None] = []

    def look(facts: StepFacts) -> None:
        shares.append(whole.moment.share)
        losses.append(facts.validation_loss)

    train(whole, objective(words), config(validate_every=8), on_step=look)
    assert shares[:7] == [0, 0.25, 0.5, 0.75, 1, 1, 1] and losses[:7] == [None] * 7
    with pytest.raises(KeyboardInterrupt):
        train(first, objective(words), config(), tmp_path, on_step=Stop(2))
    train(second, objective(words), config(), tmp_path)
    assert equal(weights(whole), weights(second))
    with pytest.raises(ValueError, match="gradual_steps was 4 and is 5"):
        train(model(GRADUAL), objective(words), config(steps=10), tmp_path)


def test_validation_is_of_the_wholly_rounded_model(words: Dataset) -> None:
    m = model(replace(GRADUAL, gradual=Gradual(until=1.0)))
    found = train(m, objective(words), config(steps=2))
    goal = objective(words)
    m.moment.share = 1.0
    assert found.validation_loss == mean_loss(m, goal, goal.validation())
    m.moment.share = 0.5
    assert found.validation_loss != mean_loss(m, goal, goal.validation())
