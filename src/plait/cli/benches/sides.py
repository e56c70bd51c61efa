"""Measures several sides fairly on a shared, noisy machine: in turns within one run, medians, ratios pair by pair.

A side is a function that does some work and returns one measurement: seconds, or a rate. The limits of the machine
(`limits.py`) are sides too, so that a disturbance falls on the work and on its limit alike.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from plait.report import Report

Side = Callable[[], float]
OURS = "plait"
# a side that takes long is measured less often: seconds for all of its counted runs
BUDGET_S = 60.0

log = logging.getLogger(__name__)


class DisagreementError(RuntimeError):
    """Two sides that should compute the same do not: there is nothing to time."""


def timed(run: Callable[[], object], repeats: int = 1) -> Side:
    """A side that returns the seconds of one run, the mean of `repeats`."""

    def side() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        _wait()
        return (time.perf_counter() - begin) / repeats

    return side


def alternate(
    sides: Mapping[str, Side], rounds: int, *, label: str = "", report: Report | None = None, budget_s: float = BUDGET_S
) -> dict[str, list[float]]:
    """Measurements of each side, in turn, after one run of each that does not count.

    Args:
        sides: name -> what to run; what `plait` or its limits raise is raised, a peer that fails is left out.
        rounds: counted runs of each; a side whose first run took long does fewer, about as many as the budget allows.
        label: what the log calls this measurement.
        report: where the failure of a peer is noted.
        budget_s: see rounds.

    Returns: name -> measurements, without the sides that failed.
    """
    found: dict[str, list[float]] = {}
    wanted: dict[str, int] = {}
    if label:
        log.info("%s: %s", label, ", ".join(sides))
    for name, run in sides.items():
        begin = time.perf_counter()
        first = _attempt(name, run, label, report)
        took = time.perf_counter() - begin
        if first is not None:
            fits = 1 if took > budget_s else max(2, int(budget_s / max(took, 1e-9)))
            wanted[name] = min(rounds, fits)
            # a run that long needs no warming up
            found[name] = [first] if took > budget_s / 4 else []
    for turn in range(rounds):
        for name in list(found):
            if len(found[name]) < wanted[name]:
                value = _attempt(name, sides[name], label, report)
                if value is None:
                    del found[name]
                else:
                    found[name].append(value)
        if label:
            log.info("%s: round %d of %d", label, turn + 1, rounds)
    return found


def _attempt(name: str, run: Side, label: str, report: Report | None) -> float | None:
    try:
        return run()
    except Exception as error:
        # the figures of the others are worth printing; our own failure is not to be glossed over
        if report is None or name.startswith(OURS):
            raise
        words = str(error).strip().splitlines()
        report.add(" ".join(filter(None, (label, name))), f"failed: {words[-1] if words else type(error).__name__}")
        log.warning("%s %s failed and is left out: %s", label, name, error)
        return None


def require_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Compare two results before anything is timed.

    Args:
        what: named in the error.
        ours, theirs: same shape, any float dtype.
        tolerance: the largest allowed |ours - theirs| / |theirs|, as Euclidean norms.

    Returns: the relative difference.
    Raises: DisagreementError if it is larger, or not finite.
    """
    if ours.shape != theirs.shape:
        raise DisagreementError(f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    a, b = ours.detach().double().flatten(), theirs.detach().double().flatten()
    difference = float((a - b).norm() / b.norm().clamp(min=1e-30))
    if not math.isfinite(difference) or difference > tolerance:
        raise DisagreementError(f"{what}: results disagree by {difference:.2g} before timing; allowed is {tolerance:g}")
    return difference


def add_median(report: Report, name: str, values: Sequence[float], unit: str) -> float:
    """Add the median of some measurements, with their standard deviation; returns it."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    median = statistics.median(values)
    report.add(name, median, unit, n=len(values), spread=spread)
    return median


def add_ratio(report: Report, name: str, a: Sequence[float], b: Sequence[float]) -> float:
    """Add the median of a / b, round by round; where one side has fewer rounds, over those that both have."""
    return add_median(report, name, [x / y for x, y in zip(a, b, strict=False)], "x")


def add_share(report: Report, name: str, rates: Sequence[float], need: float, limits: Sequence[float]) -> float:
    """Add what fraction of a limit is reached, round by round.

    Args:
        rates: things per second. need: bytes or FLOPs that one thing needs. limits: bytes/s or FLOP/s of the machine.
    """
    return add_median(report, name, [r * need / limit for r, limit in zip(rates, limits, strict=False)], "of the limit")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
