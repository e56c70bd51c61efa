"""What a run tells while it goes on: facts of each step, to a progress line, JSON lines and TensorBoard.

    FLOPs of a step = 3 x (tokens x FLOPs per token + visible keys x FLOPs per token and key)

forward once and backward twice; attention counts the keys each token really sees, recompute counts nothing. Utilisation
is that over time over the machine's own GEMM speed in the compute dtype, measured once.
"""

import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from plait.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What is known after a step.

    step, steps: updates made, and of the whole run. loss: mean nats per counted token of this step's batch. lr: rate
    of this update. grad_norm: before clipping. tokens: read so far by all updates. tokens_per_s: of this step.
    flops_per_s, utilisation: achieved, and over the measured peak; None where the peak is not known. time_left_s: at
    the recent pace. skipped: steps left out so far, spikes: of them, those for a spike of the loss or gradient.
    rollbacks: times the run went back. applied: False if this one was left out. validation_loss: when it was measured
    after this step. metrics: the objective's own figures.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    flops_per_s: float
    utilisation: float | None
    time_left_s: float
    skipped: int = 0
    spikes: int = 0
    rollbacks: int = 0
    applied: bool = True
    validation_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The facts in one line for people."""
        parts = [f"step {self.step}/{self.steps}", f"loss {self.loss:.4f}", f"lr {self.lr:.2e}"]
        parts += [
            f"grad {self.grad_norm:.2f}",
            f"{self.tokens_per_s:,.0f} tok/s",
            f"{self.flops_per_s / 1e9:,.1f} GFLOP/s",
        ]
        if self.utilisation is not None:
            parts[-1] += f" ({self.utilisation:.0%} of peak)"
        parts.append(f"{clock(self.time_left_s)} left")
        if self.skipped:
            parts.append(f"{self.skipped} skipped" + (f" ({self.spikes} for spikes)" if self.spikes else ""))
        if self.rollbacks:
            parts.append(f"went back {self.rollbacks} times" if self.rollbacks > 1 else "went back once")
        if self.validation_loss is not None:
            parts.append(f"validation {self.validation_loss:.4f}")
        return "  ".join(parts)


class Observer(Protocol):
    """Something that is told after every step and when the run ends, however it ends."""

    def step(self, facts: StepFacts) -> None:
        """Take the facts of one step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


def step_flops(config: ModelConfig, tokens: int, keys: int) -> int:
    """FLOPs of forward and backward over `tokens` tokens that see `keys` keys together."""
    cost = config.cost()
    return 3 * (tokens * cost.flops_per_token + keys * cost.flops_per_token_per_key)


@functools.cache
def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a large square matrix product on this device, FLOP/s; measured for 0.2 s, once per process."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + 0.2
    for _ in range(200):
        begin = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            break
    return 2 * n**3 / best


def clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3:07, 2:15:00."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


class JsonLines:
    """Appends a JSON object per step to a file; a file from an earlier process is first cut back."""

    def __init__(self, path: Path, *, after: int, every: int = 1) -> None:
        """Args: path: the file. after: draws of data made, skipped ones too; later lines are no part of the run."""
        self.every = every
        _cut(path, after)
        self.file = path.open("a", encoding="utf-8")

    def step(self, facts: StepFacts) -> None:
        """Write one line if it is due."""
        if facts.step % self.every and facts.applied and facts.validation_loss is None:
            return
        self.write({key: value for key, value in asdict(facts).items() if value is not None and value != {}})

    def write(self, data: Mapping[str, object]) -> None:
        """Write one line: at least the `step` and the number `skipped` so far."""
        words = {key: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in data.items()}
        # one write per line and no buffer left behind, so that a killed run loses nothing but its last line
        try:
            self.file.write(json.dumps(words) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What JsonLines wrote, without steps that the run went back from and a last line that a killed process tore."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        # a step that was left out has the number of the one before it
        beyond = row["step"] + (not row.get("applied", True))
        while found and found[-1]["step"] >= beyond:
            found.pop()
        found.append(row)
    return found


def _cut(path: Path, after: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            data = json.loads(line)
            if data["step"] + data.get("skipped", 0) > after:
                break
        except (ValueError, KeyError, TypeError):
            # the torn last line of a killed process
            break
        kept.append(line + "\n")
    write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Raises: OSError naming the file; nothing is left behind then.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


class TensorBoard:
    """Scalars for TensorBoard, in its own event files."""

    def __init__(self, folder: Path, *, after: int) -> None:
        """Raises: ValueError if tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard=true needs the package: pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder), purge_step=after + 1)

    def step(self, facts: StepFacts) -> None:
        """Write all numbers of a step."""
        for key in ("loss", "lr", "grad_norm", "tokens_per_s", "utilisation", "skipped", "validation_loss"):
            value = getattr(facts, key)
            if value is not None:
                self.writer.add_scalar(key, value, facts.step)
        for key, value in facts.metrics.items():
            self.writer.add_scalar(key, value, facts.step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
