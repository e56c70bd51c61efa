"""Draws means with their intervals, one row each over a common axis, in the manner of chart.py.

A row without an interval (one measurement) is a dot; a row without a value is only named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from plait.cli.page.chart import LETTER, WIDTH, Axis, Scale, colour

ROW, TOP, BOTTOM = 26, 22, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """name: at the left. index: colour. value: the dot. low, high: ends of the interval. word: in place of a value."""

    name: str
    index: int
    value: float | None
    low: float | None = None
    high: float | None = None
    word: str = ""


def interval_chart(rows: Sequence[Row], axis: Axis, *, title: str, zero: float = 0.0, width: int = WIDTH) -> str:
    """Draw rows below each other, with a line at `zero`.

    Args:
        rows: at least one of them with a value.
        axis: of the values.
        title: read out where the drawing cannot be seen.
        zero: a value to compare with; the axis includes it.
        width: of the drawing.

    Raises: ValueError if no row has a value.
    """
    values = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    if not values:
        raise ValueError(f"chart {title!r} has no values")
    left = 14 + LETTER * max(len(row.name) for row in rows)
    bottom = TOP + ROW * len(rows)
    across = Scale(axis, [*values, zero], left + 8, width - 24)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {bottom + BOTTOM}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="{width - 24}" y="{bottom + BOTTOM - 4}" text-anchor="end">{escape(axis.label)}</text>',
    ]
    for tick in across.ticks:
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        words = escape(axis.show(tick))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{words}</text>')
    parts.append(f'<line class="zero" x1="{across(zero):.1f}" x2="{across(zero):.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        parts.append(_row(row, TOP + ROW * number + ROW / 2 - 4, left, across))
    return "".join([*parts, "</svg>"])


def _row(row: Row, height: float, left: float, across: Scale) -> str:
    shade = colour(row.index)
    drawn = (
        f'<text class="name {shade}" x="{left:.1f}" y="{height + 4:.1f}" text-anchor="end">{escape(row.name)}</text>'
    )
    if row.low is not None and row.high is not None:
        ends = f'x1="{across(row.low):.1f}" x2="{across(row.high):.1f}"'
        drawn += f'<line class="line {shade}" {ends} y1="{height:.1f}" y2="{height:.1f}"/>'
    if row.value is not None:
        drawn += f'<circle class="dot {shade}" cx="{across(row.value):.1f}" cy="{height:.1f}" r="4"/>'
    elif row.word:
        drawn += f'<text class="tick" x="{left + 12:.1f}" y="{height + 4:.1f}">{escape(row.word)}</text>'
    return drawn
