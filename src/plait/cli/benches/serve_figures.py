"""The figures of a load: how many tokens were made, how long people waited, and both as one curve.

time to first token   from when the request was due to the first piece of text, its waiting in the queue included
time between tokens   (last piece - first piece) / (tokens - 1) of an answer
longest gap           the longest time between two pieces of an answer
output tokens/s       tokens of all whole answers / time from the first request to the last piece
refused, failed       answers that the server turned away (429, 503), and those that broke; they count nowhere else
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.table import Table

from plait.cli.benches.picture import picture
from plait.cli.benches.serve_client import REFUSED, Heard
from plait.cli.benches.sides import add_median, add_ratio
from plait.cli.page.chart import Axis, Series, line_chart
from plait.report import Report

SHARES = (0.5, 0.9, 0.99)
UNITS = {"output tokens/s": "tokens/s", "input tokens/s": "tokens/s", "requests/s": "requests/s"}
HEADS = "load|server|answers|refused|failed|tokens/s|first ms p50|p99|next ms p50|p99".split("|")
CURVES = {
    "time to first token": "ms to the first token: median, and thin the 99th percentile",
    "time between tokens": "ms between tokens: median, and thin the 99th percentile",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One load: of an open loop its rate in requests/s, of a closed one its askers."""

    rate: float = 0.0
    askers: int = 0

    @property
    def name(self) -> str:
        """In the report."""
        return f"rate {self.rate:g}/s" if self.rate else f"concurrency {self.askers}"


@dataclass(slots=True, kw_only=True)
class Round:
    """What one server did under one load, once: figures by name, and how its requests ended."""

    figures: dict[str, float] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    cached_tokens: float = 0.0


def summed(heard: Sequence[Heard]) -> Round:
    """The figures of one round."""
    found = Round()
    for one in heard:
        end = one.error.partition(":")[0] or "whole"
        found.ends[end] = found.ends.get(end, 0) + 1
    refused = [1000 * (one.ended_s - one.sent_s) for one in heard if one.error == REFUSED]
    if refused:
        found.figures |= {f"time to be refused p{100 * share:g}": quantile(refused, share) for share in SHARES}
    whole = [one for one in heard if not one.error]
    if not whole:
        return found
    took = max(one.pieces_s[-1] for one in whole) - min(one.due_s for one in heard)
    n_tokens = sum(one.tokens for one in whole)
    found.prompt_tokens = statistics.mean(one.prompt_tokens for one in whole)
    found.cached_tokens = statistics.mean(one.cached_tokens for one in whole)
    found.answer_tokens = n_tokens / len(whole)
    found.figures["output tokens/s"] = n_tokens / took
    found.figures["input tokens/s"] = sum(one.prompt_tokens for one in whole) / took
    found.figures["requests/s"] = len(whole) / took
    several = [one for one in whole if one.tokens > 1]
    kinds = {
        "time to first token": [one.pieces_s[0] - one.due_s for one in whole],
        "time between tokens": [(one.pieces_s[-1] - one.pieces_s[0]) / (one.tokens - 1) for one in several],
        "longest gap": [max(b - a for a, b in pairwise([one.pieces_s[0], *one.pieces_s])) for one in several],
        "time to the end": [one.pieces_s[-1] - one.due_s for one in whole],
    }
    for kind, values in kinds.items():
        for share in SHARES:
            if values:
                found.figures[f"{kind} p{share * 100:g}"] = 1000 * quantile(values, share)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def add_level(report: Report, level: Level, sides: dict[str, list[Round]]) -> None:
    """Add what each server did under a load, over all rounds, and of two their ratios, round by round.

    Args:
        sides: name of the server -> its rounds.
    """
    for name, rounds in sides.items():
        where = f"{level.name} {name}"
        ends: dict[str, int] = {}
        for one in rounds:
            for end, n in one.ends.items():
                ends[end] = ends.get(end, 0) + n
        report.add(f"{where} whole answers", ends.pop("whole", 0))
        report.add(f"{where} refused", ends.pop(REFUSED, 0))
        report.add(f"{where} failed", sum(ends.values()))
        for end, n in sorted(ends.items()):
            report.add(f"{where} failed: {end}", n)
        done = [one for one in rounds if one.answer_tokens]
        if done:
            report.add(f"{where} prompt, mean", statistics.mean(one.prompt_tokens for one in done), "tokens")
            cached = statistics.mean(one.cached_tokens for one in done)
            report.add(f"{where} prompt from a cache, mean", cached, "tokens")
            report.add(f"{where} answer, mean", statistics.mean(one.answer_tokens for one in done), "tokens")
        for figure in dict.fromkeys(figure for one in rounds for figure in one.figures):
            values = [one.figures[figure] for one in rounds if figure in one.figures]
            add_median(report, f"{where} {figure}", values, UNITS.get(figure, "ms"))
    if len(sides) == 2:
        ours, theirs = ([one.figures for one in rounds] for rounds in sides.values())
        for figure in ("output tokens/s", "time to first token p50", "time between tokens p50"):
            pairs = [(a[figure], b[figure]) for a, b in zip(ours, theirs, strict=True) if figure in a and figure in b]
            if pairs and all(b > 0 for _, b in pairs):
                add_ratio(report, f"{level.name} server / against, {figure}", *map(list, zip(*pairs, strict=True)))


def draw(levels: Sequence[Level], rounds: dict[str, dict[str, list[Round]]]) -> str:
    """Throughput against latency as one SVG: a line per server, its median and, fainter, its 99th percentile."""
    x = Axis(label="output tokens/s", from_zero=True)
    charts = []
    for kind, label in CURVES.items():
        series: list[Series] = []
        names = list(next(iter(rounds.values())))
        for i, name in enumerate(names):
            for share, ending in ((0.5, ""), (0.99, " p99")):
                points = [
                    (_median(rounds[level.name][name], "output tokens/s"), value)
                    for level in levels
                    if (value := _median(rounds[level.name][name], f"{kind} p{share * 100:g}")) > 0
                ]
                if points:
                    words = (name if len(names) > 1 else "p50") if not ending else ending.strip() * (len(names) == 1)
                    series.append(Series(name=words, index=i, points=points, faint=bool(ending), dots=not ending))
        if series:
            charts.append(line_chart(series, x, Axis(label=label, is_log=True), title=f"{kind} by throughput"))
    return picture(charts)


def _median(rounds: Sequence[Round], figure: str) -> float:
    values = [one.figures[figure] for one in rounds if figure in one.figures]
    return statistics.median(values) if values else 0.0


def table(levels: Sequence[Level], rounds: dict[str, dict[str, list[Round]]]) -> Table:
    """The figures that matter most: a row per load and server, medians over the rounds."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in HEADS:
        drawn.add_column(head, justify="left" if head in ("load", "server") else "right")
    for level in levels:
        for i, (name, several) in enumerate(rounds[level.name].items()):
            whole, refused = (sum(one.ends.get(end, 0) for one in several) for end in ("whole", REFUSED))
            failed = sum(sum(one.ends.values()) for one in several) - whole - refused
            figures = [
                _median(several, figure)
                for figure in ("output tokens/s", *(f"{kind} p{share}" for kind in CURVES for share in (50, 99)))
            ]
            row = [level.name if i == 0 else "", name, str(whole), str(refused), str(failed)]
            drawn.add_row(*row, *(f"{value:,.1f}" if whole else "-" for value in figures))
    return drawn
