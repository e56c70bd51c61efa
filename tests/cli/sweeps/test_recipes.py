"""The sweeps that ship with Plait: each reads, names models that can be built, and compares what it says."""

from pathlib import Path

import pytest
import torch

from plait.cli.recipe import TrainRecipe
from plait.cli.sweeps.table import read, trials
from plait.config import load
from plait.model.hybrid import Hybrid

LAB = Path(__file__).resolve().parents[3] / "recipes" / "lab"
BASES = ("hybrid-10m.toml", "transformer-10m.toml", "proxy-1m.toml")
SWEEPS = sorted(path.name for path in LAB.glob("*.toml") if path.name not in BASES)


def test_there_are_sweeps_and_all_bases_are_used() -> None:
    used = {path.name for name in SWEEPS if (path := read(LAB / name).base)}
    assert len(SWEEPS) >= 7 and used == set(BASES)


@pytest.mark.parametrize("name", BASES)
def test_bases_are_training_recipes_of_the_size_they_say(name: str) -> None:
    recipe = load(TrainRecipe, LAB / name)
    params = recipe.model.config(2048 if "1m" in name else 4096).cost().params
    assert params == pytest.approx(1e6 if "1m" in name else 1.04e7, rel=0.07)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_method_of_a_sweep_fits_its_model(name: str) -> None:
    sweep = read(LAB / name)
    found = trials(sweep)
    assert sweep.title and sweep.about and sweep.baseline
    assert len({trial.seed for trial in found}) >= 2
    for trial in {trial.method: trial for trial in found}.values():
        recipe = trial.recipe()
        with torch.device("meta"):
            model = Hybrid(recipe.model.config(sweep.vocab_size), recipe.precision)
        assert next(model.parameters()).is_meta
        # a bad batch lies within the run, and before its rate decays
        assert all(draw < 0.8 * recipe.run.steps for draw in recipe.data.bad_batches)


def test_sweeps_of_precision_change_nothing_but_the_precision() -> None:
    for name in ("precision.toml", "nvfp4-ablations.toml", "switch.toml"):
        found = trials(read(LAB / name))
        rest = [{key: value for key, value in t.settings.items() if key not in ("precision", "seed")} for t in found]
        assert all(one == rest[0] for one in rest), name


def test_each_ablation_computes_in_something_else() -> None:
    found = {trial.method: trial.recipe().precision for trial in trials(read(LAB / "nvfp4-ablations.toml"))}
    assert len({(recipe.rules, recipe.switch) for recipe in found.values()}) == len(found) == 9
    whole, chance = found["nvfp4"].rules[-1].format, found["no-chance"].rules[-1].format
    assert whole.fprop == chance.fprop and whole.dgrad[0].rounding == "stochastic" == whole.wgrad[0].rounding
    assert {chance.dgrad[0].rounding, chance.wgrad[0].rounding} == {"nearest"}
    assert not any(x.hadamard for pair in vars_of(found["no-rotation"].rules[-1].format) for x in pair)
    assert all(x.hadamard for pair in vars_of(found["rotation-everywhere"].rules[-1].format) for x in pair)
    assert found["weights-1d"].rules[-1].format.fprop[1].block == (1, 16)
    assert len(found["all-layers"].rules) == 1 and found["first-layers"].rules[0].first == 0.15


def vars_of(form: object) -> list[tuple]:
    return [getattr(form, name) for name in ("fprop", "dgrad", "wgrad")]
