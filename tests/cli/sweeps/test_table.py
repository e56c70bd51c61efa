"""The sweep file: which runs follow from it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_train import RECIPE

from plait.cli.sweeps.table import Sweep, laid, read, trials
from plait.config import ConfigError, from_dict


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text(RECIPE)
    return path


def sweep(base: Path, **tables: Any) -> Sweep:
    return from_dict(Sweep, {"base": base, **tables})


def test_runs_are_all_choices_the_first_seed_of_everything_first(base: Path) -> None:
    found = trials(sweep(base, axes={"recipe": ["bf16", "fp32"], "seed": [0, 1], "lr": [1e-3, 1e-2]}))
    assert len(found) == 8 and [trial.seed for trial in found] == [0] * 4 + [1] * 4
    assert found[0].name == "bf16-lr0.001-seed0" and found[0].method == "bf16"
    assert {(t.recipe().precision.name, t.recipe().seed, t.recipe().run.schedule.peak) for t in found} == {
        (recipe, seed, lr) for recipe in ("bf16", "fp32") for seed in (0, 1) for lr in (1e-3, 1e-2)
    }


def test_variants_set_several_things_and_are_all_taken_unless_some_are_named(base: Path) -> None:
    variants = {"plain": {}, "small": {"model.mlp.d_ff": 32, "run": {"optim": {"clip": 0.5}}}}
    found = trials(sweep(base, variants=variants))
    assert [trial.method for trial in found] == ["plain", "small"]
    small = found[1].recipe()
    assert small.run.optim.clip == 0.5 and small.model.settings["mlp"] == {"d_ff": 32}
    assert small.run.steps == found[0].recipe().run.steps == 6
    assert [t.method for t in trials(sweep(base, variants=variants, axes={"variant": ["small"]}))] == ["small"]


def test_settings_lie_over_the_base_and_axes_over_settings(base: Path) -> None:
    tables = {"settings": {"run": {"steps": 9, "schedule.peak": 5.0}}, "axes": {"lr": [1e-3, 1e-2]}}
    found = trials(sweep(base, **tables))
    assert [(t.recipe().run.steps, t.recipe().run.schedule.peak) for t in found] == [(9, 1e-3), (9, 1e-2)]


def test_what_is_the_same_in_all_runs_is_not_in_their_names(base: Path) -> None:
    found = trials(sweep(base, axes={"recipe": ["fp32"], "model.mlp.d_ff": [32, 64]}))
    assert [trial.method for trial in found] == ["d_ff=32", "d_ff=64"]


def test_a_table_may_stand_where_the_base_has_a_word(base: Path) -> None:
    own = {"precision": {"base": "bf16", "rules": [{"role": "mlp.*", "format": "fp32"}]}}
    found = trials(sweep(base, variants={"plain": {}, "own": own}))
    assert found[1].settings["precision"]["base"] == "bf16" and found[1].recipe().precision.rules


def test_steps_and_tokens_replace_each_other() -> None:
    assert laid({"tokens": 5, "run": {"keep": 1}}, {"run.steps": 3}) == {"run": {"keep": 1, "steps": 3}}
    assert laid({"run": {"keep": 1, "steps": 3}}, {"tokens": 5}) == {"tokens": 5, "run": {"keep": 1}}


def test_laying_changes_leaves_the_original_alone() -> None:
    original = {"a": {"b": 1}}
    laid(original, {"a.b": 2})
    assert original == {"a": {"b": 1}}


def test_the_base_lies_beside_the_sweep_and_words_change_it(base: Path) -> None:
    path = base.with_name("sweep.toml")
    path.write_text('base = "base.toml"\n[axes]\nseed = [0, 1]\n')
    found = trials(read(path, ["axes.seed=[5]", "settings.run.steps=2"]))
    assert [(t.seed, t.recipe().run.steps) for t in found] == [(5, 2)]


def test_the_same_run_at_another_rate(base: Path) -> None:
    trial = trials(sweep(base, axes={"lr": [1e-3, 1e-2]}))[0].at(0.00316)
    assert trial.name == "base-lr0.00316-seed0" and trial.recipe().run.schedule.peak == 0.00316


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "nothing varies"),
        ({"axes": {"seed": []}}, "axes.seed is empty"),
        ({"axes": {"seed": 3}}, "expected a list"),
        ({"axes": {"seed": [1, 1]}}, "holds a value twice"),
        ({"axes": {"seed": [0.5]}}, "expected numbers from 0"),
        ({"axes": {"lr": ["high"]}}, "expected numbers from 0"),
        ({"axes": {"lr": [0.0, 1e-3]}}, "learning rate must be above 0"),
        ({"axes": {"run.shedule.peak": [1e-3]}}, 'unknown key "run.shedule"; did you mean "schedule"'),
        ({"axes": {"recipe": ["bf17"]}}, "bf16"),
        ({"axes": {"lr": [1e-3], "run.schedule.peak": [1e-2]}}, "twice; keep one"),
        ({"axes": {"data": [{"seq_len": 3}]}}, "put settings that belong together"),
        ({"axes": {"variant": ["quite"]}, "variants": {"quiet": {}}}, 'did you mean "quiet"'),
        ({"variants": {"a": {}, "b": {"run.steps": 6}}}, "have the same settings; a variant changes nothing"),
        ({"variants": {"a": {"seed": 4}}, "axes": {"seed": [0, 1]}}, "set by the axis and by variants.a"),
        ({"axes": {"recipe": ["bf16", "fp32"]}, "baseline": "fp23"}, 'did you mean "fp32"'),
        ({"axes": {"recipe": ["bf16", "fp32"]}, "reference": "nvfp4"}, 'reference="nvfp4" is not among the runs'),
        ({"axes": {"lr": [1e-3]}, "find": "largest stable"}, "at least two learning rates"),
        ({"axes": {"seed": [0]}, "fnid": 3}, 'did you mean "find"'),
        ({"axes": {"seed": [0]}, "stable": {"within": 1.0}}, "within=1.0"),
    ],
)
def test_what_is_wrong_is_named(base: Path, tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trials(sweep(base, **tables))
    assert message in str(caught.value)
