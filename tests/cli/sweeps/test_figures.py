"""Runs as figures: pairs, best rates, curves, and what was measured inside."""

import json
from pathlib import Path
from typing import Any

import pytest

from plait.cli.sweeps.figures import differing, gap, gap_curve, inside, methods, over_layers
from plait.cli.sweeps.runner import Done
from plait.cli.sweeps.table import Trial
from plait.cli.sweeps.trial import Result


def done(
    method: str, seed: int, loss: float | None, lr: float | None = None, folder: Path = Path(), **settings: Any
) -> Done:
    name = f"{method}-{lr}-{seed}"
    result = Result(
        status="finished" if loss is not None else "diverged",
        loss=loss,
        first_loss=8.0,
        step=10,
        seconds=2.0,
        tokens_per_s=100.0,
    )
    trial = Trial(name=name, method=method, seed=seed, lr=lr, settings={"seed": seed, **settings})
    return Done(trial, result, folder / name)


def test_gaps_pair_seeds_at_the_best_rate_of_each() -> None:
    found = methods(
        [
            *(done("a", seed, loss, 1e-3) for seed, loss in enumerate((2.0, 4.0))),
            *(done("a", seed, loss, 1e-2) for seed, loss in enumerate((9.0, 9.0))),
            *(done("b", seed, loss, 1e-3) for seed, loss in enumerate((5.0, 5.0))),
            *(done("b", seed, loss, 1e-2) for seed, loss in enumerate((2.2, 4.4))),
        ]
    )
    assert (found["a"].best_lr, found["b"].best_lr) == (1e-3, 1e-2)
    pair = gap(found["b"], found["a"])
    assert pair is not None and pair.mean == pytest.approx(0.1) and pair.high == pytest.approx(0.1)


def test_a_rate_at_which_a_seed_diverged_is_best_only_if_all_are_such() -> None:
    both = [done("a", 0, 1.0, 1e-2), done("a", 1, None, 1e-2), done("a", 0, 3.0, 1e-3), done("a", 1, 3.0, 1e-3)]
    assert methods(both)["a"].best_lr == 1e-3
    assert methods(both[:2])["a"].best_lr == 1e-2


def test_without_a_finished_pair_there_is_no_gap() -> None:
    found = methods([done("a", 0, 2.0), done("a", 1, None), done("b", 0, None), done("b", 1, 2.0)])
    assert gap(found["b"], found["a"]) is None


def test_the_gap_over_training_is_taken_where_all_pairs_validated(tmp_path: Path) -> None:
    # the second seed of b ended after two validations, and a validated nowhere after the third
    curves = {"a-0": (4.0, 2.0, 3.0), "b-0": (5.0, 2.2, 3.3, 9.0), "a-1": (2.0, 2.0, 2.0), "b-1": (2.1, 2.6)}
    runs = []
    for name, losses in curves.items():
        run = done(name[0], int(name[2]), 1.0, folder=tmp_path)
        run.folder.mkdir()
        rows = [{"step": i, "loss": 1.0, "tokens": 10 * i, "validation_loss": loss} for i, loss in enumerate(losses)]
        lines = [*map(json.dumps, rows), '{"step": 9, "torn']
        (run.folder / "metrics.jsonl").write_text("\n".join(lines))
        runs.append(run)
    found = methods(runs)
    assert [(at, one.mean, one.n) for at, one in gap_curve(found["b"], found["a"])] == [
        (0, pytest.approx(0.15), 2),
        (10, pytest.approx(0.2), 2),
    ]


def test_a_run_that_went_back_or_had_no_finite_loss_has_a_curve_all_the_same(tmp_path: Path) -> None:
    curves = {"a": [(1, 2.0), (2, 2.0), (3, 2.0)], "b": [(1, 3.0), (2, 9.0), (1, 4.0), (2, "inf"), (3, 5.0)]}
    runs = []
    for name, points in curves.items():
        run = done(name, 0, 1.0, folder=tmp_path)
        run.folder.mkdir()
        lines = [json.dumps({"step": s, "loss": 1.0, "tokens": 10 * s, "validation_loss": loss}) for s, loss in points]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines))
        runs.append(run)
    found = methods(runs)
    assert [(at, one.mean) for at, one in gap_curve(found["b"], found["a"])] == [(10, 1.0), (30, 1.5)]


def test_telemetry_is_sorted_by_quantity_and_layer(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "figures": {"blocks.0.mixer.o_proj.l2": 1.0, "blocks.2.mixer.o_proj.l2": 3.0, "embed.l2": 7.0}},
        {"step": 5, "figures": {"blocks": {"0": {"mixer": {"o_proj.l2": 2.0}}}, "blocks.2.mixer.o_proj.l2": "nan"}},
    ]
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = inside(tmp_path)
    assert found == {"o_proj.l2": {"0": [(1, 1.0), (5, 2.0)], "2": [(1, 3.0)]}, "embed.l2": {"": [(1, 7.0)]}}
    assert over_layers(found["o_proj.l2"]) == [(1, 2.0), (5, 2.0)]
    assert inside(tmp_path / "nowhere") == {}


def test_settings_that_differ_are_found() -> None:
    runs = [done("a", 0, 1.0, run={"steps": 5, "keep": 1}), done("b", 0, 1.0, run={"steps": 6, "keep": 1}, x=1)]
    assert differing(runs) == ["run.steps", "x"]
