"""Shows how a sweep goes: runs done of all, the run that is on, and how long the rest will take."""

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from plait.cli.sweeps.table import Trial
from plait.cli.sweeps.trial import Result
from plait.train.metrics import clock

EVERY_S = 10.0


class Board:
    """A bar over all steps on a terminal, and a line per run; elsewhere lines alone."""

    def __init__(self, trials: Iterable[Trial], stream: TextIO | None = None) -> None:
        """Args: trials: those known so far. stream: where to show; standard error by default."""
        self.stream = stream or sys.stderr
        self.steps: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.ended: set[str] = set()
        # steps made by this process, for the pace
        self.fresh, self.began, self.due = 0, time.monotonic(), 0.0
        self.bar = self.task = None
        self.expect(trials)
        if self.stream is not None and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(file=self.stream))
            self.task = self.bar.add_task("starting", total=sum(self.steps.values()))
            self.bar.start()

    def expect(self, trials: Iterable[Trial]) -> None:
        """Add runs that were not known before."""
        for trial in trials:
            self.steps.setdefault(trial.name, trial.recipe().run.steps)

    def step(self, trial: Trial, step: int, loss: float) -> None:
        """A run has come to this step."""
        if trial.name in self.done:
            self.fresh += max(step - self.done[trial.name], 0)
        self.done[trial.name] = step
        self._show(f"{trial.name} step {step}/{self.steps[trial.name]}  loss {loss:.4f}")

    def end(self, trial: Trial, result: Result, is_new: bool = True) -> None:
        """A run has ended, now or in an earlier sweep."""
        self.ended.add(trial.name)
        # a run that stopped early needs no more steps
        self.done[trial.name] = self.steps[trial.name]
        how = f"loss {result.loss:.4f}" if result.loss is not None else f"diverged: {result.reason}"
        when = clock(result.seconds) if is_new else "earlier"
        self._say(f"[{len(self.ended)}/{len(self.steps)}] {trial.name}  {how}  ({when})")
        self._show("", is_due=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self.stream is not None:
            print(line, file=self.stream, flush=True)

    def _show(self, line: str, is_due: bool = True) -> None:
        done, total = sum(self.done.values()), sum(self.steps.values())
        passed = time.monotonic() - self.began
        left = f"{clock(passed / self.fresh * (total - done))} left" if self.fresh else ""
        words = "  ".join(part for part in (f"{len(self.ended)}/{len(self.steps)} runs", line, left) if part)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, description=words)
        elif is_due and time.monotonic() >= self.due:
            self.due = time.monotonic() + EVERY_S
            self._say(words)
