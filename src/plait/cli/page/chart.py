"""Draws line charts as SVG that takes its colours from the page, so that one drawing suits light and dark.

Lines are named at their ends instead of in a legend, or beside the chart where they end at different places. Text
inherits the page's colour; series i has the class `s{i}`, of which there are COLOURS; those beyond them are dashed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 44, 94, 30, 38
COLOURS = 8
# a letter of a name, at most
LETTER = 7.6
# room of a row of crosses above the axes
STRIP = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. points: (x, y), finite. index: its colour. name: written at its end, "" for nothing.

    faint: drawn thin, behind the others. dots: mark the points. band: (x, low, high) behind the line.
    crosses: x of what has no y, marked in a row above the axes.
    """

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    crosses: Sequence[float] = ()


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


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, title: str, width: int = WIDTH, height: int = HEIGHT
) -> str:
    """Draw lines over common axes.

    Args:
        series: at least one, with at least one point each, or crosses.
        x, y: the axes.
        title: read out where the drawing cannot be seen.
        width, height: of the drawing, in the page's pixels where its column is as wide.

    Raises: ValueError without points, for values that are not finite, or not positive on a logarithmic axis.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"chart {title!r} has no points")
    values = [*(p[1] for p in points), *(value for one in series for _, *ends in one.band for value in ends)]
    places = [*(p[0] for p in points), *(place for one in series for place in one.crosses)]
    crossed = [one for one in series if one.crosses]
    named = [one for one in series if one.name and one.points]
    # lines that end at different places are named beside the chart, with a piece of the line
    is_aside = len({one.points[-1][0] for one in named}) > 1
    room = max([0.0, *(14 + LETTER * len(one.name) + 26 * is_aside for one in named)])
    right, top = width - max(RIGHT, room), TOP + STRIP * len(crossed)
    across = Scale(x, places, LEFT, right)
    up = Scale(y, values, height - BOTTOM, top, room=0.06)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="0" y="12">{escape(y.label)}</text>',
        f'<text class="axis" x="{right:.0f}" y="{height - 4}" text-anchor="end">{escape(x.label)}</text>',
        *_grid(across, up, x, y, right, height),
    ]
    parts += [_band(one, across, up) for one in series if one.band]
    for one in sorted(series, key=lambda one: not one.faint):
        parts.append(_line(one, across, up))
    for row, one in enumerate(crossed):
        parts += [_cross(one, across(place), TOP - 6 + STRIP * row) for place in one.crosses]
    for one, at in zip(named, _apart([up(one.points[-1][1]) for one in named]), strict=True):
        end = right + 34 if is_aside else across(one.points[-1][0]) + 8
        if is_aside:
            parts.append(f'<path class="{_stroke(one)}" d="M{right + 8:.1f},{at:.1f}h20"/>')
        parts.append(f'<text class="name {colour(one.index)}" x="{end:.1f}" y="{at + 4:.1f}">{escape(one.name)}</text>')
    return "".join([*parts, "</svg>"])


def colour(index: int) -> str:
    """The class that gives series `index` its colour."""
    return f"s{index % COLOURS}"


class Scale:
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


def _grid(across: Scale, up: Scale, x: Axis, y: Axis, right: float, height: float) -> list[str]:
    parts = []
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        words = escape(y.show(value))
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{words}</text>')
    for value in across.ticks:
        words = escape(x.show(value))
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{height - 20}" text-anchor="middle">{words}</text>'
        )
    return parts


def _stroke(one: Series) -> str:
    return f"line {colour(one.index)}{' faint' if one.faint else ''}{' dashed' if one.index >= COLOURS else ''}"


def _band(one: Series, across: Scale, up: Scale) -> str:
    upper = [(across(place), up(high)) for place, _, high in one.band]
    lower = [(across(place), up(low)) for place, low, _ in reversed(one.band)]
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in upper + lower)
    return f'<polygon class="band {colour(one.index)}" points="{corners}"/>'


def _line(one: Series, across: Scale, up: Scale) -> str:
    places = [(across(a), up(b)) for a, b in one.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    drawn = f'<polyline class="{_stroke(one)}" points="{path}"/>' if places else ""
    if one.dots:
        drawn += "".join(
            f'<circle class="dot {colour(one.index)}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places
        )
    return drawn


def _cross(one: Series, x: float, y: float) -> str:
    return f'<path class="line cross {colour(one.index)}" d="M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"/>'


def _apart(heights: Sequence[float], least: float = 15.0) -> list[float]:
    """Move names that would overlap away from each other, keeping their order and their middle."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # groups of names that touch: each spreads about the mean of the places they want
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _ends(groups[-2], heights, least)[1] > _ends(groups[-1], heights, least)[0]:
            last = groups.pop()
            groups[-1] += last
    moved = list(heights)
    for group in groups:
        begin = _ends(group, heights, least)[0] + least / 2
        for place, i in enumerate(group):
            moved[i] = begin + place * least
    return moved


def _ends(group: Sequence[int], heights: Sequence[float], least: float) -> tuple[float, float]:
    middle = sum(heights[i] for i in group) / len(group)
    return middle - len(group) * least / 2, middle + len(group) * least / 2
