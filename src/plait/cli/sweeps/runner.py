"""Runs the runs of a sweep: one after the other, or some side by side; what has ended is not run again.

Side by side each run is a process of its own with its share of the cores; its folder tells how far it is. Those
processes save and end when this one has been killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plait.cli.failure import BAD_INPUT, INTERRUPTED
from plait.cli.machine import cores
from plait.cli.sweeps.board import Board
from plait.cli.sweeps.table import Sweep, Trial
from plait.cli.sweeps.trial import Result, result_of, run
from plait.config import ConfigError
from plait.train.checkpoints import flatten
from plait.train.interrupt import Interrupts
from plait.train.metrics import StepFacts, write_whole

LOOK_S = 0.2
# bytes that hold the last line of a metrics.jsonl
END = 1 << 16


@dataclass(frozen=True, slots=True)
class Done:
    """A run that has ended, and where."""

    trial: Trial
    result: Result
    folder: Path


def folder_of(out: Path, trial: Trial) -> Path:
    """Where a run is kept."""
    return out / "runs" / trial.name


def check_places(trials: Sequence[Trial], out: Path) -> None:
    """See that what a folder holds of earlier runs is of these ones.

    Raises: ConfigError naming the run and the setting that differs.
    """
    for trial in trials:
        folder = folder_of(out, trial)
        begun = (folder / "result.json").is_file() or any(folder.glob("checkpoints/step-*"))
        if not begun or not (folder / "settings.json").is_file():
            continue
        before = flatten(json.loads((folder / "settings.json").read_text(encoding="utf-8")))
        now = flatten(json.loads(json.dumps(trial.settings)))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"out={out} holds run {trial.name} with {name}={before.get(name)!r}, the sweep says "
                    f"{now.get(name)!r}; choose another folder with --out, or put the setting back"
                )


def run_all(trials: Sequence[Trial], out: Path, sweep: Sweep, board: Board, jobs: int = 1) -> list[Done]:
    """Run those that have not ended; returns all, in the order given.

    Args:
        trials: of the sweep.
        out: folder of the sweep.
        board: shows how it goes.
        jobs: runs at a time.

    Raises: what a run raises, once the others have been told to save; KeyboardInterrupt when asked to stop.
    """
    waiting = []
    for trial in trials:
        found = result_of(folder_of(out, trial))
        if found is None:
            waiting.append(trial)
        else:
            board.end(trial, found, is_new=False)
    if jobs == 1:
        for trial in waiting:
            watch = _Watch(trial, board)
            board.end(trial, run(trial, folder_of(out, trial), sweep.keep_weights, [watch]))
    else:
        _side_by_side(waiting, out, sweep, board, jobs)
    done = []
    for trial in trials:
        result = result_of(folder_of(out, trial))
        assert result is not None
        done.append(Done(trial, result, folder_of(out, trial)))
    return done


class _Watch:
    """Tells the board of each step."""

    def __init__(self, trial: Trial, board: Board) -> None:
        self.trial, self.board = trial, board

    def step(self, facts: StepFacts) -> None:
        """Pass it on."""
        self.board.step(self.trial, facts.step, facts.loss)

    def close(self) -> None:
        """Nothing to close."""


def _side_by_side(waiting: list[Trial], out: Path, sweep: Sweep, board: Board, jobs: int) -> None:
    waiting, running = list(waiting), {}
    with Interrupts() as interrupts:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    trial = waiting.pop(0)
                    running[trial.name] = trial, _start(trial, folder_of(out, trial), sweep, jobs)
                time.sleep(LOOK_S)
                if interrupts.asked:
                    raise KeyboardInterrupt
                for trial, process in list(running.values()):
                    folder = folder_of(out, trial)
                    if process.poll() is None:
                        _look(trial, folder, board)
                        continue
                    del running[trial.name]
                    result = result_of(folder)
                    if result is None:
                        _fail(trial, folder, process.returncode)
                    else:
                        board.end(trial, result)
        finally:
            # a run that is told to stop saves first
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()


def _start(trial: Trial, folder: Path, sweep: Sweep, jobs: int) -> "subprocess.Popen[bytes]":
    folder.mkdir(parents=True, exist_ok=True)
    job = {"trial": asdict(trial), "keeps_weights": sweep.keep_weights, "parent": os.getpid()}
    write_whole(folder / "job.json", json.dumps(job) + "\n")
    threads = str(max(1, cores() // jobs))
    command = [sys.executable, "-m", "plait.cli.sweeps.trial", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        # a session of its own: Ctrl-C comes to this process, which tells them
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,
        )


def _look(trial: Trial, folder: Path, board: Board) -> None:
    found = _last(folder / "metrics.jsonl")
    if found is not None:
        board.step(trial, int(found["step"]), float(found["loss"]))


def _last(path: Path) -> dict[str, Any] | None:
    """The newest whole line of a JSON-lines file, None without one; reads its end alone, as it is asked for often."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - END, 0))
        whole = file.read().rpartition(b"\n")[0]
    line = whole.rpartition(b"\n")[2]
    return json.loads(line) if line else None


def _fail(trial: Trial, folder: Path, status: int) -> None:
    said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = f"run {trial.name}: {said[-1] if said else f'ended with status {status}'}"
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    raise (ValueError if status == BAD_INPUT else RuntimeError)(f"{message} (see {folder / 'log.txt'})")
