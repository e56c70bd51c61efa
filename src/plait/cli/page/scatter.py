"""Draws named points over two axes, with the line of those that no other beats, in the manner of chart.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from plait.cli.page.chart import BOTTOM, HEIGHT, LEFT, LETTER, TOP, WIDTH, Axis, Scale, colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """name: written beside it, "" for nothing. index: colour. faint: small and pale, behind the others."""

    x: float
    y: float
    name: str = ""
    index: int = 0
    faint: bool = False


def scatter_chart(
    points: Sequence[Point], x: Axis, y: Axis, *, title: str, limit: float | None = None, width: int = WIDTH
) -> str:
    """Draw points; less is better on both axes.

    Args:
        points: at least one.
        x, y: the axes.
        title: read out where the drawing cannot be seen.
        limit: a ceiling on x, drawn as an upright line.
        width: of the drawing.

    Raises: ValueError without points, or as chart.Scale.
    """
    if not points:
        raise ValueError(f"chart {title!r} has no points")
    right = width - 16
    limits = [] if limit is None else [limit]
    across = Scale(x, [*(p.x for p in points), *limits], LEFT, right, room=0.08)
    up = Scale(y, [p.y for p in points], HEIGHT - BOTTOM, TOP, room=0.08)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="0" y="12">{escape(y.label)}</text>',
        f'<text class="axis" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x.label)}</text>',
    ]
    for value in up.ticks:
        at = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        words = escape(y.show(value))
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{words}</text>')
    for value in across.ticks:
        at, words = across(value), escape(x.show(value))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{words}</text>')
    if limit is not None:
        at = across(limit)
        parts.append(f'<line class="zero" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at - 5:.1f}" y="{TOP + 2}" text-anchor="end">budget</text>')
    line = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in front(points))
    parts.append(f'<polyline class="line s0 faint" points="{line}"/>')
    for p in sorted(points, key=lambda p: not p.faint):
        shade, size = colour(p.index), 2.5 if p.faint else 4
        pale = ' opacity=".45"' if p.faint else ""
        parts.append(f'<circle class="dot {shade}" cx="{across(p.x):.1f}" cy="{up(p.y):.1f}" r="{size}"{pale}/>')
    parts += _names(points, across, up, right)
    return "".join([*parts, "</svg>"])


def front(points: Sequence[Point]) -> list[Point]:
    """Those that none beats on both axes, by x."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not found or p.y < found[-1].y:
            found.append(p)
    return found


def _names(points: Sequence[Point], across: Scale, up: Scale, right: float) -> list[str]:
    """Names beside their points, on the side with room, moved down where another name is in the way."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for p in sorted((p for p in points if p.name), key=lambda p: up(p.y)):
        at, height, wide = across(p.x), up(p.y) + 4, LETTER * len(p.name)
        is_right = at + 8 + wide <= right
        begin = at + 8 if is_right else at - 8 - wide
        while any(begin < b + w and b < begin + wide and abs(height - h) < 14 for b, h, w in taken):
            height += 3
        taken.append((begin, height, wide))
        parts.append(f'<text class="name {colour(p.index)}" x="{begin:.1f}" y="{height:.1f}">{escape(p.name)}</text>')
    return parts
