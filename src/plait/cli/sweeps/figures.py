"""The runs of a sweep as figures to compare: losses by method, rate and seed, and curves over training."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.cli.sweeps.runner import Done
from plait.cli.sweeps.statistics import Interval, gaps, interval
from plait.train.checkpoints import flatten
from plait.train.metrics import read_lines

# final loss of each seed, None where the run diverged
Seeds = dict[int, float | None]
Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Method:
    """What one method did. index: its colour. by_lr: runs by rate and seed; the rate None where none varies."""

    name: str
    index: int
    by_lr: dict[float | None, dict[int, Done]]

    def losses(self, lr: float | None) -> Seeds:
        """Final losses at a rate."""
        return {seed: done.result.loss for seed, done in self.by_lr[lr].items()}

    @property
    def best_lr(self) -> float | None:
        """The rate of the lowest mean loss among those at which every seed finished, or else most did."""

        def rank(lr: float | None) -> tuple[int, float]:
            found = list(finished(self.losses(lr)).values())
            lost = len(self.by_lr[lr]) - len(found)
            return lost, sum(found) / len(found) if found else float("inf")

        return min(self.by_lr, key=rank)

    @property
    def first_loss(self) -> float | None:
        """Mean loss before any update."""
        found = [d.result.first_loss for seeds in self.by_lr.values() for d in seeds.values()]
        known = [loss for loss in found if loss is not None]
        return sum(known) / len(known) if known else None

    @property
    def speed(self) -> float:
        """Tokens per second, the median of all runs."""
        speeds = sorted(d.result.tokens_per_s for seeds in self.by_lr.values() for d in seeds.values())
        return speeds[len(speeds) // 2]


def methods(done: Iterable[Done]) -> dict[str, Method]:
    """Runs by method, in the order of the table."""
    found: dict[str, Method] = {}
    for one in done:
        trial = one.trial
        method = found.setdefault(trial.method, Method(trial.method, len(found), {}))
        method.by_lr.setdefault(trial.lr, {})[trial.seed] = one
    for method in found.values():
        for lr in sorted(lr for lr in method.by_lr if lr is not None):
            method.by_lr[lr] = method.by_lr.pop(lr)
    return found


def finished(losses: Seeds) -> dict[int, float]:
    """Those that did not diverge."""
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def gap(method: Method, baseline: Method) -> Interval | None:
    """Relative gap of the final losses, each at its own best rate; None without a pair of finished runs."""
    ours, theirs = (finished(m.losses(m.best_lr)) for m in (method, baseline))
    found = gaps(ours, theirs)
    return interval(found) if found else None


def gap_curve(method: Method, baseline: Method) -> list[tuple[float, Interval]]:
    """The gap wherever both validated, over tokens."""
    ours, theirs = ({s: validations(d.folder) for s, d in m.by_lr[m.best_lr].items()} for m in (method, baseline))
    at: dict[float, list[float]] = {}
    for seed in ours:
        pairs = dict(theirs.get(seed, ()))
        for tokens, loss in ours[seed]:
            if tokens in pairs:
                at.setdefault(tokens, []).append(loss / pairs[tokens] - 1)
    whole = max(map(len, at.values()), default=0)
    # where a run ended early, the mean would jump to other seeds
    return [(tokens, interval(found)) for tokens, found in sorted(at.items()) if len(found) == whole]


def validations(folder: Path) -> Points:
    """(tokens, validation loss) of a run, where that was finite."""
    found = [row for row in read_lines(folder / "metrics.jsonl") if "validation_loss" in row]
    points = [(float(row["tokens"]), float(row["validation_loss"])) for row in found]
    return [point for point in points if math.isfinite(point[1])]


def inside(folder: Path) -> dict[str, dict[str, Points]]:
    """What was measured inside a run's model: by quantity and by layer, (step, value).

    blocks.3.mixer.q_proj.l2 is the quantity q_proj.l2 of layer 3.
    """
    found: dict[str, dict[str, Points]] = {}
    for row in read_lines(folder / "telemetry.jsonl"):
        step = float(row["step"])
        for name, value in flatten(row.get("figures", {})).items():
            if isinstance(value, (int, float)) and abs(value) < float("inf"):
                match = re.fullmatch(r"blocks\.(\d+)\.(?:mixer\.)?(.+)", name)
                layer, quantity = match.groups() if match else ("", name)
                found.setdefault(quantity, {}).setdefault(layer, []).append((step, float(value)))
    return found


def over_layers(layers: Mapping[str, Sequence[tuple[float, float]]]) -> Points:
    """The mean over layers at each step."""
    at: dict[float, list[float]] = {}
    for points in layers.values():
        for step, value in points:
            at.setdefault(step, []).append(value)
    return [(step, sum(found) / len(found)) for step, found in sorted(at.items())]


def differing(done: Sequence[Done]) -> list[str]:
    """Names of settings that are not the same in all runs, but for seed and rate."""
    tables = [flatten(one.trial.settings) for one in done]
    names = sorted({name for table in tables for name in table})
    return [n for n in names if any(table.get(n) != tables[0].get(n) for table in tables)]
