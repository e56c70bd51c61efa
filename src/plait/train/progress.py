"""Shows how a run goes: a bar with the latest facts on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import TextIO

from plait.train.metrics import Observer, StepFacts


def progress(steps: int, done: int = 0, stream: TextIO | None = None) -> Observer:
    """What fits the stream (standard error by default) of a run of `steps`, of which `done` are made."""
    stream = stream or sys.stderr
    return Bar(steps, done) if stream is not None and stream.isatty() else Lines(stream)


class Lines:
    """One line at first, then every few seconds, and for everything worth a line: validation, skips, the end."""

    def __init__(self, stream: TextIO | None, every_s: float = 5.0) -> None:
        """Args: stream: where lines go; None for nowhere. every_s: seconds between ordinary ones."""
        self.stream, self.every_s, self.due = stream, every_s, 0.0

    def step(self, facts: StepFacts) -> None:
        """Print the facts if it is time."""
        now = time.monotonic()
        worth = facts.validation_loss is not None or not facts.applied or facts.step == facts.steps
        if self.stream is not None and (worth or now >= self.due):
            self.due = now + self.every_s
            print(facts.line(), file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing to close."""


class Bar:
    """A bar that rewrites itself, with validation losses as lines above it."""

    def __init__(self, steps: int, done: int) -> None:
        """Args: steps, done: length of the bar and where it starts."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(stderr=True))
        self.task = self.bar.add_task("starting", total=steps, completed=done)
        self.bar.start()

    def step(self, facts: StepFacts) -> None:
        """Move on."""
        self.bar.update(self.task, completed=facts.step, description=facts.line())
        if facts.validation_loss is not None or not facts.applied:
            self.bar.console.print(facts.line(), markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()
