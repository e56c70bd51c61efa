"""Measures two sides fairly on a shared, noisy machine: alternated in one run, medians, ratios pair by pair."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plait.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """against: the peer, or empty. precision: "bf16", "fp32" or "both". rounds: counted runs of each side."""

    against: str
    precision: str
    rounds: int


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn, after one run of each that does not count.

    Args:
        sides: name -> what to run.
        rounds: counted runs of each.

    Returns: name -> `rounds` wall-clock seconds.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def add_median(report: Report, name: str, values: list[float], unit: str) -> float:
    """Add the median of some measurements, with their standard deviation; returns it."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    median = statistics.median(values)
    report.add(name, median, unit, n=len(values), spread=spread)
    return median
