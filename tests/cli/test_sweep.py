"""`plait sweep`: runs of a table, each in its folder, again only where needed, compared on a page."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.test_train import RECIPE
from tests.train.tiny import write_documents

from plait.cli import train
from plait.cli.launch import launch

SWEEP = """
base = "base.toml"
baseline = "fp32"
[settings.run]
steps = 3
[axes]
recipe = ["fp32", "bf16"]
seed = [0, 1]
"""
RATES = """
base = "base.toml"
find = "largest stable"
[settings.run]
steps = 12
save_every = 0
[stable]
worse = 0.5
within = 4.0
probes = 2
[axes]
lr = [1e-2, 10.0]
[variants.plain]
[variants.unclipped]
"run.optim.clip" = 0.0
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, its data and a sweep over it."""
    (tmp_path / "words").mkdir()
    write_documents(tmp_path / "words" / "train", n=60)
    write_documents(tmp_path / "words" / "valid", n=10, seed=1)
    (tmp_path / "base.toml").write_text(RECIPE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "rates.toml").write_text(RATES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_sweep_runs_its_table_and_compares(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["sweep", "sweep.toml", "--out", "out", "--json"]) == 0
    said = capsys.readouterr()
    facts = {fact["name"]: fact["value"] for fact in json.loads(said.out.splitlines()[-1])["facts"]}
    assert facts["runs"] == 4 and abs(facts["bf16 gap"]) < 1 and facts["bf16 gap, low"] < facts["bf16 gap, high"]
    assert "[4/4] bf16-seed1  loss" in said.err
    assert names(place / "out" / "runs") == {"fp32-seed0", "fp32-seed1", "bf16-seed0", "bf16-seed1"}
    run = place / "out" / "runs" / "fp32-seed0"
    # weights go when the run has ended
    assert names(run) >= {"settings.json", "result.json", "metrics.jsonl"} and not (run / "checkpoints").exists()
    assert "Distance from fp32" in (place / "out" / "report.html").read_text()
    # the loss of each run is that of the same recipe by itself
    assert launch(["train", "base.toml", "run.steps=3", "seed=1", "--out", "alone"]) == 0
    assert losses(place / "alone") == losses(place / "out" / "runs" / "fp32-seed1")
    assert losses(place / "alone") != losses(run)


def test_what_has_ended_is_not_run_again_and_what_is_new_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["sweep", "sweep.toml", "--out", "out", "axes.seed=[0]", "keep_weights=true"]
    assert launch(one) == 0
    result = place / "out" / "runs" / "bf16-seed0" / "result.json"
    before = result.stat().st_mtime_ns, (place / "out" / "runs" / "bf16-seed0" / "final").is_dir()
    capsys.readouterr()
    assert launch([*one[:-2], "axes.seed=[0,1]"]) == 0
    said = capsys.readouterr().err
    assert "bf16-seed0  loss" in said and said.count("earlier") == 2
    assert (result.stat().st_mtime_ns, True) == before
    assert (place / "out" / "runs" / "bf16-seed1" / "result.json").is_file()


def test_an_interrupted_sweep_goes_on_where_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli.sweeps.board import Board

    words = ["sweep", "sweep.toml", "settings.run.steps=6"]

    def stop(board: Board, trial: object, step: int, loss: float) -> None:
        # in the middle of the second run
        if len(board.ended) == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Board, "step", stop)
    assert launch([*words, "--out", "out"]) == 130
    runs = place / "out" / "runs"
    assert names(runs) == {"fp32-seed0", "bf16-seed0"} and not (runs / "bf16-seed0" / "result.json").exists()
    # what there is, is told
    assert "All runs" in (place / "out" / "report.html").read_text()
    assert (runs / "bf16-seed0" / "checkpoints" / "step-000004").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert launch([*words, "--out", "out"]) == 0
    assert launch([*words, "--out", "whole"]) == 0
    for name in names(runs):
        assert losses(runs / name) == losses(place / "whole" / "runs" / name)


def test_a_diverged_run_is_a_result_and_the_edge_is_looked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["sweep", "rates.toml", "settings.run.max_skipped=2", "--out", "out", "--json"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    facts = {fact["name"]: fact["value"] for fact in json.loads(said)["facts"]}
    stable, unstable = facts["plain largest stable rate"], facts["plain first unstable rate"]
    # 1e-2 .. 10, halved in ratio twice
    assert unstable / stable == pytest.approx(1000**0.25, rel=0.01) and 0.01 <= stable < unstable <= 10
    assert facts["runs"] == 8 and 0 < facts["plain LR sensitivity"]
    assert "How large the learning rate may be" in (place / "out" / "report.html").read_text()
    # the same probes are found again, and none is run twice
    capsys.readouterr()
    assert launch(["sweep", "rates.toml", "settings.run.max_skipped=2", "--out", "out"]) == 0
    assert capsys.readouterr().err.count("earlier") == 8


def test_a_loss_that_diverges_is_recorded_and_the_sweep_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plait.train.loop import DivergedError

    real = train.run

    def run(inputs: train.Inputs, observers: object = None) -> object:
        if "bf16-seed0" in str(inputs.out):
            raise DivergedError("too high")
        return real(inputs, observers)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(train, "run", run)
    assert launch(["sweep", "sweep.toml", "--out", "out"]) == 0
    assert "bf16-seed0  diverged: too high" in capsys.readouterr().err
    result = json.loads((place / "out" / "runs" / "bf16-seed0" / "result.json").read_text())
    assert (result["status"], result["loss"], result["reason"]) == ("diverged", None, "too high")
    assert "1 of 2, rest diverged" in (place / "out" / "report.html").read_text()


def test_a_dry_run_counts_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(place)
    assert launch(["sweep", "sweep.toml", "--dry-run", "--json"]) == 0
    facts = {fact["name"]: fact["value"] for fact in json.loads(capsys.readouterr().out)["facts"]}
    assert facts["runs"] == 4 and facts["tokens of all runs"] == 4 * 3 * 96 and facts["hours of all runs"] > 0
    assert facts["FLOPs of all runs"] > 4 * 3 * 96 * 6 * 10_000
    assert names(place) == before


def test_any_text_will_do(place: Path) -> None:
    (place / "texts").mkdir()
    for i in range(6):
        (place / "texts" / f"{i}.txt").write_text(f"the quick brown fox {i} jumps over the lazy dog. " * 60)
    words = ["sweep", "sweep.toml", "axes.seed=[0]", "settings.data.seq_len=16", "vocab_size=400", "--out", "out"]
    assert launch([*words, "--text", "texts"]) == 0
    assert names(place / "out" / "tokens") == {"train", "valid", "tokenizer"}
    assert launch([*words, "--text", "words"]) == 2


def test_what_does_not_fit_is_told_before_tokens_are_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "texts").mkdir()
    before = names(place)
    words = ["sweep", "sweep.toml", 'axes.recipe=["fp32", "mxfp8"]', "--text", "texts", "--out", "out"]
    assert launch(words) == 2
    assert "no text in 0 files" in capsys.readouterr().err and names(place) == before
    (place / "texts" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    # a projection of 4 heads is no multiple of 32
    assert launch(words) == 2
    assert "blocks of 1x32 do not divide" in capsys.readouterr().err and names(place) == before


@pytest.mark.slow
def test_runs_side_by_side_are_the_same_runs(place: Path) -> None:
    assert launch(["sweep", "sweep.toml", "--out", "two", "--jobs", "2"]) == 0
    assert launch(["sweep", "sweep.toml", "--out", "one"]) == 0
    for name in names(place / "one" / "runs"):
        assert losses(place / "one" / "runs" / name) == pytest.approx(losses(place / "two" / "runs" / name), rel=1e-5)


@pytest.mark.slow
def test_runs_side_by_side_save_when_they_are_stopped(place: Path) -> None:
    words = ["sweep", "sweep.toml", "settings.run.steps=100000", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "plait", *words])
    runs, deadline = place / "out" / "runs", time.monotonic() + 120
    while time.monotonic() < deadline and len(list(runs.glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert len(list(runs.glob("*/checkpoints/step-*"))) == 2


@pytest.mark.slow
def test_runs_side_by_side_end_with_a_sweep_that_is_killed(place: Path) -> None:
    words = ["sweep", "sweep.toml", "settings.run.steps=100000", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "plait", *words])
    runs, deadline = place / "out" / "runs", time.monotonic() + 120
    while time.monotonic() < deadline and len(list(runs.glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.2)
    process.kill()
    process.wait()
    # saved and let go of: the next sweep begins where they were
    while time.monotonic() < deadline and len(list(runs.glob("*/checkpoints/step-*"))) < 2:
        time.sleep(0.2)
    assert len(list(runs.glob("*/checkpoints/step-*"))) == 2


def test_a_run_ends_with_the_sweep_that_started_it_and_with_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli.sweeps import trial

    told: list[tuple[int, int]] = []
    parents = iter([7, 7, 7, 7, 1])
    monkeypatch.setattr(trial, "LOOK_S", 0.0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda *what: told.append(what))
    trial.end_with(8)
    assert next(parents) == 7
    trial.end_with(7)
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [(os.getpid(), signal.SIGTERM)] and list(parents) == []


def test_only_the_end_of_a_running_run_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli.sweeps import runner

    monkeypatch.setattr(runner, "END", 50)
    path = place / "m.jsonl"
    assert runner._last(path) is None
    path.write_text('{"torn')
    assert runner._last(path) is None
    path.write_text("no json, and out of reach" * 9 + '\n{"step": 7, "loss": "nan"}\n{"step": 8, "l')
    assert runner._last(path) == {"step": 7, "loss": "nan"}


def test_a_run_beside_others_that_fails_says_why(place: Path) -> None:
    from plait.cli.sweeps.runner import _fail
    from plait.cli.sweeps.table import Trial

    trial = Trial(name="a", method="a", seed=0, lr=None, settings={})
    (place / "log.txt").write_text("first\nno space left\n")
    with pytest.raises(RuntimeError, match="run a: no space left"):
        _fail(trial, place, 1)
    with pytest.raises(ValueError, match="no space left"):
        _fail(trial, place, 2)
    with pytest.raises(KeyboardInterrupt):
        _fail(trial, place, 130)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["axes.sede=[1]"], 'unknown key "sede"; did you mean "seed"'),
        (["axes.seed=[]"], "axes.seed is empty"),
        (['axes.variant=["x"]'], "no [variants] table"),
        (["baseline=bf17"], 'did you mean "bf16"'),
        (["settings.model.d_model=0"], "d_model"),
        (["settings.data.sources.words.path=nowhere"], "nowhere"),
        (['axes.recipe=["int8", "fp32"]'], "cannot be trained"),
        (["--text", "nowhere"], "text=nowhere is no folder"),
        (["--jobs", "0"], "jobs=0"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(place)
    assert launch(["sweep", "sweep.toml", *words, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert names(place) == before


def test_a_folder_with_other_runs_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["sweep", "sweep.toml", "axes.seed=[0]", "--out", "out"]) == 0
    capsys.readouterr()
    assert launch(["sweep", "sweep.toml", "settings.run.steps=4", "--out", "out"]) == 2
    assert "holds run fp32-seed0 with run.steps=3, the sweep says 4" in capsys.readouterr().err
