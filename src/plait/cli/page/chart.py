"""Draws line charts as SVG that takes its colours from the page, so that one drawing suits light and dark.

Lines are named at their ends instead of in a legend. Text inherits the page's colour; series i has the class `s{i}`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 94, 30, 38


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. points: (x, y), finite. index: its colour. name: written at its end, "" for nothing.

    faint: drawn thin, behind the others. dots: mark the points.
    """

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """label: what it counts. show: a value as words. is_log: logarithmic. ticks: where to write; None finds places.

    from_zero: begin at zero, as lengths and speeds should; the other axes begin near their smallest value.
    """

    label: str
    show: Callable[[float], str] = "{:g}".format
    is_log: bool = False
    from_zero: bool = False
    ticks: Sequence[float] | None = None


def line_chart(series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> str:
    """Draw lines over common axes.

    Args:
        series: at least one, with at least one point each.
        x, y: the axes.
        title: read out where the drawing cannot be seen.

    Raises: ValueError without points, for values that are not finite, or not positive on a logarithmic axis.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"chart {title!r} has no points")
    across = _Scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP, room=0.06)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="0" y="12">{escape(y.label)}</text>',
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x.label)}</text>',
    ]
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(y.show(value))}</text>'
        )
    for value in across.ticks:
        words = escape(x.show(value))
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{words}</text>'
        )
    for one in sorted(series, key=lambda one: not one.faint):
        parts.append(_line(one, across, up))
    named = [one for one in series if one.name]
    heights = _apart([up(one.points[-1][1]) for one in named])
    for one, height in zip(named, heights, strict=True):
        end = across(one.points[-1][0]) + 8
        parts.append(f'<text class="name s{one.index}" x="{end:.1f}" y="{height + 4:.1f}">{escape(one.name)}</text>')
    return "".join([*parts, "</svg>"])


class _Scale:
    """Values to places on the page."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float, room: float = 0.0) -> None:
        if not all(map(math.isfinite, values)) or (axis.is_log and min(values) <= 0):
            raise ValueError(f"axis {axis.label!r} cannot show {min(values)} .. {max(values)}")
        self.log = axis.is_log
        low, high = self._place(min(values)), self._place(max(values))
        if high == low:
            low, high = low - 0.5, high + 0.5
        low, high = low - room * (high - low), high + room * (high - low)
        if axis.from_zero and not axis.is_log:
            low = 0.0
        self.low, self.high, self.begin, self.end = low, high, begin, end
        found = axis.ticks if axis.ticks is not None else self._find()
        self.ticks = [v for v in found if low - 1e-9 <= self._place(v) <= high + 1e-9]

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.begin + (self._place(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def _find(self) -> list[float]:
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                ticks = [step * 10.0**decade for decade in decades for step in steps]
                if sum(self.low <= math.log10(t) <= self.high for t in ticks) >= 3:
                    break
            return ticks
        rough = (self.high - self.low) / 5.5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
        first = math.ceil(self.low / step)
        return [(first + i) * step for i in range(math.floor(self.high / step) - first + 1)]


def _line(one: Series, across: _Scale, up: _Scale) -> str:
    places = [(across(a), up(b)) for a, b in one.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    drawn = f'<polyline class="line s{one.index}{" faint" if one.faint else ""}" points="{path}"/>'
    if one.dots:
        drawn += "".join(f'<circle class="dot s{one.index}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places)
    return drawn


def _apart(heights: Sequence[float], least: float = 15.0) -> list[float]:
    """Move names that would overlap away from each other, keeping their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for above, below in zip(order, order[1:], strict=False):
        missing = least - (moved[below] - moved[above])
        if missing > 0:
            moved[above] -= missing / 2
            moved[below] += missing / 2
    return moved
