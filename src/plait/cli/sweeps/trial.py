"""One run of a sweep: trained in its folder, its result written when it has ended, also where it diverged.

FOLDER/settings.json   the recipe of this run
FOLDER/result.json     how it ended: finished or diverged; only there when the run need not be run again
FOLDER/...             what `plait train` writes: metrics.jsonl, checkpoints to resume from, telemetry.jsonl

As a program (python -m plait.cli.sweeps.trial FOLDER) it runs what FOLDER/job.json says, for runs side by side.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from plait.cli import train
from plait.cli.failure import verdict
from plait.cli.sweeps.table import Trial
from plait.train.loop import DivergedError
from plait.train.metrics import Observer, read_lines, write_whole

# of the training losses, whose mean is the final one where nothing is held out
LAST = 0.1
# seconds between looks for the parent
LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended.

    loss: validation loss at the end, or the mean over the last tenth of training; None if it diverged. first_loss: of
    the first batch, before any update, None if that is not in metrics.jsonl. step: updates made. seconds: of the
    steps. tokens_per_s: median over steps. reason: of a divergence.
    """

    status: Literal["finished", "diverged"]
    loss: float | None
    first_loss: float | None
    step: int
    seconds: float
    tokens_per_s: float
    reason: str = ""


def run(trial: Trial, folder: Path, keeps_weights: bool, observers: Sequence[Observer] = ()) -> Result:
    """Train one run to its end, from where it was interrupted if it was.

    Raises: what `plait train` raises, DivergedError excepted: that is a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "settings.json", json.dumps(trial.settings, indent=1) + "\n")
    reason = ""
    try:
        train.run(train.Inputs(recipe=folder / "settings.json", out=folder), observers=list(observers))
    except DivergedError as error:
        reason = str(error)
    result = _result(read_lines(folder / "metrics.jsonl"), reason)
    if not keeps_weights:
        for name in ("checkpoints", "final"):
            shutil.rmtree(folder / name, ignore_errors=True)
    # after everything else: with it the run is done
    write_whole(folder / "result.json", json.dumps(asdict(result), indent=1) + "\n")
    return result


def result_of(folder: Path) -> Result | None:
    """The result of a run that has ended."""
    path = folder / "result.json"
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _result(steps: Sequence[dict], reason: str) -> Result:
    applied = [row for row in steps if row.get("applied", True)]
    losses = [float(row["loss"]) for row in applied]
    validation = next((row["validation_loss"] for row in reversed(applied) if "validation_loss" in row), None)
    last = losses[-max(1, round(LAST * len(losses))) :]
    final = None if not losses else float(validation) if validation is not None else sum(last) / len(last)
    # a loss that is no number is a run that went wrong, whatever the loop says
    if final is not None and not math.isfinite(final):
        reason = reason or f"the final loss is {final}"
    speeds = sorted(float(row["tokens_per_s"]) for row in steps)
    return Result(
        status="diverged" if reason else "finished",
        loss=None if reason else final,
        first_loss=losses[0] if applied and applied[0]["step"] == 1 else None,
        step=int(applied[-1]["step"]) if applied else 0,
        seconds=sum(_seconds(row, before) for before, row in zip([{}, *steps], steps, strict=False)),
        tokens_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
        reason=reason,
    )


def _seconds(row: dict, before: dict) -> float:
    return max(row["tokens"] - before.get("tokens", 0), 0) / row["tokens_per_s"]


def end_with(parent: int) -> None:
    """Ask this process to stop as soon as its parent is gone: a killed sweep can ask no longer, and begins anew."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    # a run that somebody starts by hand has another parent
    if os.getppid() == parent:
        threading.Thread(target=wait, daemon=True).start()


def _main(folder: Path) -> int:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    end_with(job["parent"])
    try:
        run(Trial(**job["trial"]), folder, job["keeps_weights"])
    except BaseException as error:
        status, message = verdict(error)
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
