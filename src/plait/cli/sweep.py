"""`plait sweep`: many runs of one training recipe that differ in a few settings, and a page that compares them.

OUT/runs/NAME/       a run: settings.json, metrics.jsonl, result.json; checkpoints while it is not finished
OUT/report.html      gaps to the baseline, loss by learning rate, what was measured inside
OUT/report.json      the same as data
OUT/tokens/          only with --text

A sweep that was stopped, or whose table has grown, goes on where it was: what has ended is not run again.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.cli.chapters.story import Text
from plait.cli.launch import arg
from plait.cli.quiet import quiet
from plait.cli.sweeps import corpus
from plait.cli.sweeps.board import Board
from plait.cli.sweeps.estimate import estimate
from plait.cli.sweeps.figures import methods
from plait.cli.sweeps.pages import report_of, write
from plait.cli.sweeps.rate_pages import edge_of
from plait.cli.sweeps.runner import Done, check_places, folder_of, run_all
from plait.cli.sweeps.statistics import between
from plait.cli.sweeps.table import Sweep, Trial, read, trials
from plait.cli.sweeps.trial import result_of
from plait.cli.train import Opened, opened
from plait.config import ConfigError
from plait.model.hybrid import build
from plait.report import Report
from plait.train.lock import alone

EXAMPLE = """plait sweep recipes/lab/stability.toml --text python --dry-run
  plait sweep recipes/lab/precision.toml axes.seed=[0,1,2] settings.run.steps=2000 --out runs/precision"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which sweep, where it goes, and how many runs at a time."""

    sweep: Path = arg(help="table of runs, TOML or JSON", positional=True)
    overrides: tuple[str, ...] = arg(
        default=(), help="changes of the table, e.g. axes.seed=[0,1] settings.run.steps=50", positional=True
    )
    out: Path | None = arg(default=None, help="folder of the sweep (default: runs/NAME of the file)")
    jobs: int = arg(default=1, help="runs at a time, each a process with its share of the cores")
    text: str | None = arg(default=None, help='train on this folder of text, or on "python", the standard library')
    dry_run: bool = arg(default=False, help="count runs, tokens and hours; nothing is written")

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs}: must be at least 1")


def run(inputs: Inputs) -> Report:
    """Run the table; everything that can be refused is refused before anything is written."""
    sweep = read(inputs.sweep, inputs.overrides)
    out = inputs.out or Path("runs") / inputs.sweep.stem
    table = trials(sweep)
    # the board says how it goes; the runs' own lines below warnings are left out
    with quiet("plait", below=logging.WARNING):
        text = None
        if inputs.text is not None:
            text = corpus.read(inputs.text, out, sweep.vocab_size)
            table = [corpus.on_tokens(trial, out) for trial in table]
        check_places(table, out)
        first = {trial.method: trial for trial in reversed(table)}
        first = {trial.method: first[trial.method] for trial in table}
        _check_models(first, sweep)
        if inputs.dry_run:
            return _estimated(inputs, sweep, table, first, text)
        if text is None:
            _opened(first)
        with alone(out):
            if text is not None and inputs.text is not None:
                corpus.prepare(text, inputs.text, out, sweep.vocab_size)
                _opened(first)
            return _run(inputs, sweep, table, out)


def _run(inputs: Inputs, sweep: Sweep, table: list[Trial], out: Path) -> Report:
    grid = sorted({trial.lr for trial in table if trial.lr is not None})
    title = f"plait sweep: {out / 'report.html'}"
    known = list(table)
    try:
        with Board(table) as board:
            done = run_all(table, out, sweep, board, inputs.jobs)
            while sweep.find == "largest stable" and (probes := _probes(sweep, table, done, grid)):
                known += probes
                check_places(probes, out)
                board.expect(probes)
                done += run_all(probes, out, sweep, board, inputs.jobs)
    except KeyboardInterrupt:
        done = [
            Done(trial, result, folder)
            for trial in known
            if (result := result_of(folder := folder_of(out, trial))) is not None
        ]
        if done:
            write(sweep, done, grid, report_of(sweep, done, grid, title), out)
        raise
    report = report_of(sweep, done, grid, title)
    path = write(sweep, done, grid, report, out)
    report.add("report", str(path))
    return report


def _probes(sweep: Sweep, table: Sequence[Trial], done: Sequence[Done], grid: Sequence[float]) -> list[Trial]:
    """Runs of the next rate of each method whose largest stable one is not known closely enough."""
    found = []
    for name, method in methods(done).items():
        tried = len([lr for lr in method.by_lr if lr not in grid])
        lr = between(edge_of(method, sweep.stable.worse), sweep.stable.within)
        if lr is not None and lr not in method.by_lr and tried < sweep.stable.probes:
            found += [trial.at(lr) for trial in table if trial.method == name and trial.lr == grid[0]]
    return found


def _check_models(first: dict[str, Trial], sweep: Sweep) -> None:
    """Build each method's model once, so that a recipe that does not fit is found before the first run."""
    for trial in first.values():
        recipe = trial.recipe()
        try:
            build(recipe.model.config(sweep.vocab_size), recipe.precision)
        except ValueError as error:
            raise ConfigError(f"run {trial.name}: {error}") from None


def _opened(first: dict[str, Trial]) -> dict[str, tuple[Trial, Opened]]:
    """What the methods' recipes name."""
    found = {}
    for method, trial in first.items():
        try:
            found[method] = trial, opened(trial.recipe())
        except ValueError as error:
            raise ConfigError(f"run {trial.name}: {error}") from None
    return found


def _estimated(inputs: Inputs, sweep: Sweep, table: list[Trial], first: dict[str, Trial], text: Text | None) -> Report:
    if text is None or inputs.text is None:
        return estimate(sweep, _opened(first), table, inputs.jobs)
    with tempfile.TemporaryDirectory() as folder:
        corpus.prepare(text, inputs.text, Path(folder), sweep.vocab_size)
        there = {method: corpus.on_tokens(trial, Path(folder)) for method, trial in first.items()}
        return estimate(sweep, _opened(there), table, inputs.jobs)
