"""What a table of runs says: paired gaps with their confidence interval, stable rates, sensitivity to the rate.

    gap of seed s        g_s = loss_s / baseline_s - 1                    the same seed, so the same data and order
    its interval         mean g  +-  t(n - 1, 97.5 %) sd(g) / sqrt n      sd with n - 1
    LR sensitivity       mean over rates of  min(loss, loss at the start) - best loss

Pairs differ far less than runs of different seeds do, which is why gaps are paired. A rate at which a run diverged
counts with the loss at the start.

Source   Student 1908 for the interval; Abramowitz and Stegun 26.7.3-4 for t of whole degrees of freedom;
         Wortsman et al. 2023, arXiv:2309.14322 section 2.2 for the sensitivity.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n values and where the true one lies; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def holds(self, value: float) -> bool:
        """Whether the value lies inside; never for a single measurement."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and t interval of independent values; raises ValueError for none."""
    if not values:
        raise ValueError("an interval needs at least one value")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = t_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(p: float, df: int) -> float:
    """The value that Student's t with a whole number of degrees of freedom stays below with probability p > 0.5."""
    if not 0.5 < p < 1 or df < 1:
        raise ValueError(f"p={p}, df={df}: p lies between 0.5 and 1, df is at least 1")
    low, high = 0.0, 1.0
    while _t_between(high, df) < 2 * p - 1:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_between(middle, df) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def _t_between(t: float, df: int) -> float:
    """Probability that |T| < t."""
    angle = math.atan2(t, math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    total, term = 0.0, math.cos(angle) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df + 1, 2):
        total += term
        term *= square * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total


def gaps(losses: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Relative gaps of the seeds that both have."""
    return [losses[seed] / baseline[seed] - 1 for seed in losses if seed in baseline]


def sensitivity(losses: Mapping[float, float | None], first_loss: float) -> float | None:
    """LR sensitivity over rates; None where every run diverged.

    Args:
        losses: final loss by rate, None where the run diverged.
        first_loss: before any update.
    """
    known = [loss for loss in losses.values() if loss is not None]
    if not known:
        return None
    best = min(known)
    return statistics.fmean(min(first_loss if loss is None else loss, first_loss) - best for loss in losses.values())


@dataclass(frozen=True, slots=True)
class Edge:
    """Between which rates stability ends. stable: the largest stable one, None if there is none.

    unstable: the smallest unstable one above it, None if every larger rate is stable.
    """

    stable: float | None
    unstable: float | None


def edge(losses: Mapping[float, Sequence[float | None]], worse: float) -> Edge:
    """Where stability ends, above the best rate.

    Args:
        losses: by rate, the final loss of every seed, None where it diverged.
        worse: a rate is stable if no seed diverged and each is within so many nats of the best rate's mean.
    """
    means = {lr: statistics.fmean(all_) for lr, found in losses.items() if (all_ := _whole(found))}
    if not means:
        return Edge(None, min(losses, default=None))
    best = min(means, key=means.__getitem__)
    stable = best
    # below the best rate a high loss means too little learning, not too much
    for lr in sorted(lr for lr in losses if lr > best):
        found = _whole(losses[lr])
        if not found or max(found) > means[best] + worse:
            return Edge(stable, lr)
        stable = lr
    return Edge(stable, None)


def between(found: Edge, within: float) -> float | None:
    """The rate to try next, halfway in ratio; None when both are within that factor, or one is missing."""
    if found.stable is None or found.unstable is None or found.unstable / found.stable <= within:
        return None
    # the digits that a folder's name shows
    return float(f"{math.sqrt(found.stable * found.unstable):.3g}")


def _whole(found: Sequence[float | None]) -> list[float]:
    """The losses if no run diverged, else nothing."""
    return [] if None in found else [loss for loss in found if loss is not None]
