"""The page of a sweep: it says what the figures say, needs nothing else, and leaves out what was not measured."""

import html
import json
import re
from pathlib import Path

from tests.cli.sweeps.test_figures import done

from plait.cli.sweeps.gap_pages import _short
from plait.cli.sweeps.pages import report_of, write
from plait.cli.sweeps.runner import Done
from plait.cli.sweeps.table import Sweep


def text_of(path: Path) -> str:
    page = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def precision_runs(folder: Path) -> list[Done]:
    losses = {"bf16": (2.0, 4.0, 3.0), "nvfp4": (2.02, 4.04, 3.03), "no <rounding>": (2.06, 4.12, None)}
    return [done(name, seed, loss, folder=folder) for name, each in losses.items() for seed, loss in enumerate(each)]


def test_gaps_and_ablations_are_told(tmp_path: Path) -> None:
    sweep = Sweep(baseline="bf16", reference="nvfp4", axes={"seed": [0, 1, 2]}, title="A < B", about="One.\n\nTwo.")
    runs = precision_runs(tmp_path)
    report = report_of(sweep, runs, [], "title")
    facts = {fact.name: fact for fact in report.facts}
    assert round(float(str(facts["nvfp4 gap"].value)), 9) == 1.0 and facts["nvfp4 gap"].n == 3
    assert facts["diverged"].value == 1
    page = write(sweep, runs, [], report, tmp_path)
    said = text_of(page)
    assert "A < B" in said and "nvfp4 3 3.0300 +1.00 % +1.00 % to +1.00 % 1.00" in said
    assert "no <rounding> 2 of 3, rest diverged" in said
    # 2.06 / 2.02 - 1 in both seeds
    assert "no <rounding> +1.98 % +1.98 % to +1.98 % worse +3.00 %" in said
    assert "How large the learning rate" not in said and "loses" not in said
    assert f"plait train {tmp_path.as_posix()}/runs/RUN/settings.json" in said
    whole = page.read_text()
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", whole) and "<script" not in whole
    data = json.loads((tmp_path / "report.json").read_text())
    assert [run["status"] for run in data["runs"]].count("diverged") == 1


def test_ticks_of_tokens_say_what_they_are() -> None:
    assert [_short(n) for n in (500, 2500, 10_000, 1_250_000)] == ["500", "2.5k", "10k", "1.25M"]


def stability_runs(folder: Path) -> list[Done]:
    runs = []
    for method, losses in {"plain": (5.0, 4.0, None), "normed": (5.0, 3.9, 4.1)}.items():
        for lr, loss in zip((1e-3, 1e-2, 1e-1), losses, strict=True):
            run = done(method, 0, loss, lr, folder)
            run.folder.mkdir(parents=True)
            rows = [
                {"step": step, "figures": {f"blocks.{i}.mixer.qkv.l2": 1 + step * lr * (i + 1) for i in range(2)}}
                for step in range(3)
            ]
            (run.folder / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            runs.append(run)
    return runs


def test_rates_sensitivity_and_growth_are_told(tmp_path: Path) -> None:
    sweep = Sweep(axes={"lr": [1e-3, 1e-2, 1e-1]}, variants={"plain": {}, "normed": {}}, baseline="plain")
    runs = stability_runs(tmp_path)
    grid = [1e-3, 1e-2, 1e-1]
    report = report_of(sweep, runs, grid, "title")
    facts = {fact.name: fact.value for fact in report.facts}
    assert (facts["plain largest stable rate"], facts["plain first unstable rate"]) == (1e-2, 1e-1)
    assert (facts["normed largest stable rate"], facts["normed first unstable rate"]) == (1e-1, None)
    # (1 + 0 + (8 - 4)) / 3: a diverged run counts with the loss at the start
    assert round(float(str(facts["plain LR sensitivity"])), 9) == round(5 / 3, 9)
    said = text_of(write(sweep, runs, grid, report, tmp_path))
    assert "plain 4.000 0.01 0.01 0.1 1.00 1.667" in said
    assert "normed 3.900 0.01 > 0.1 > 10.00 0.433" in said
    assert "What grows before a run diverges" in said and "qkv output norm" in said
    assert "stable, 0.01" in said and "unstable, 0.1" in said


def test_a_band_of_which_an_end_is_not_finite_is_left_out_there(tmp_path: Path) -> None:
    sweep = Sweep(axes={"lr": [1e-3, 1e-2]}, baseline="plain")
    runs = [done("plain", 0, loss, lr, tmp_path) for lr, loss in ((1e-3, 4.0), (1e-2, None))]
    for run in runs:
        run.folder.mkdir()
        rows = [
            {"step": s, "figures": {f"blocks.0.dt.p{p}": "inf" if (s, p) == (2, 95) else 0.1 * p for p in (5, 50, 95)}}
            for s in range(4)
        ]
        (run.folder / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write(sweep, runs, [1e-3, 1e-2], report_of(sweep, runs, [1e-3, 1e-2], "t"), tmp_path)
    corners = re.findall(r'<polygon class="band s[01]" points="([^"]*)"', page.read_text().split("Time steps dt")[1])
    assert [len(each.split()) for each in corners] == [6, 6]


def test_what_numbers_lose_is_told_by_tensor(tmp_path: Path) -> None:
    runs = [done("nvfp4", 0, 3.0, folder=tmp_path)]
    runs[0].folder.mkdir()
    figures = {
        f"blocks.3.mixer.up.{operand}.{name}": value
        for operand in ("x", "w", "dy")
        for name, value in (("amax", 5.0), ("underflow", 0.25), ("saturation", 0.0))
    }
    (runs[0].folder / "telemetry.jsonl").write_text(
        "".join(json.dumps({"step": step, "figures": figures}) + "\n" for step in (1, 2))
    )
    sweep = Sweep(axes={"seed": [0, 1]})
    said = text_of(write(sweep, runs, [], report_of(sweep, runs, [], "t"), tmp_path))
    assert "What nvfp4 loses" in said and "Gradients flushed to zero" in said
    assert "3 up gradients 25 % 0 % 5" in said


def test_a_sweep_that_was_stopped_tells_what_it_has(tmp_path: Path) -> None:
    sweep = Sweep(axes={"lr": [1e-3, 1e-2], "seed": [0, 1]}, variants={"a": {}, "b": {}}, baseline="a")
    runs = [done("b", 0, 3.0, 1e-3, tmp_path)]
    report = report_of(sweep, runs, [1e-3, 1e-2], "t")
    assert {fact.name: fact.value for fact in report.facts}["b LR sensitivity"] is None
    assert "All runs" in text_of(write(sweep, runs, [1e-3, 1e-2], report, tmp_path))


def test_a_sweep_in_which_everything_diverged_has_a_page(tmp_path: Path) -> None:
    sweep = Sweep(axes={"lr": [1e-3, 1e-2]}, variants={"a": {}, "b": {}}, baseline="a")
    runs = [done(name, 0, None, lr, tmp_path) for name in "ab" for lr in (1e-3, 1e-2)]
    said = text_of(write(sweep, runs, [1e-3, 1e-2], report_of(sweep, runs, [1e-3, 1e-2], "t"), tmp_path))
    assert "a diverged none 0.001" in said
