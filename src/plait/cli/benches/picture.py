"""Puts charts beside each other into one SVG file that carries its own colours, for light pages and dark ones."""

from collections.abc import Sequence

from plait.cli.page.chart import HEIGHT, WIDTH

GAP = 30
MARGIN = 8
STYLE = """
:root { --ink: #1d1c1a; --soft: #6b6760; --rule: #e4e0d8; --s0: #0a7a83; --s1: #bb5a12; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e6df; --soft: #98958d; --rule: #3a3d42; --s0: #4fc3cc; --s1: #f0a35e; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick, .axis { fill: var(--soft); font-size: 12px; }
.name { font-size: 13px; font-weight: 600; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1.2; opacity: 0.55; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); }
.dot.s0, .name.s0 { fill: var(--s0); } .dot.s1, .name.s1 { fill: var(--s1); }
"""


def picture(charts: Sequence[str]) -> str:
    """One drawing of several charts.

    Args:
        charts: from `line_chart`, of its size; set from left to right.

    Returns: the text of an SVG file.
    """
    wide = len(charts) * (WIDTH + GAP) - GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{HEIGHT + 2 * MARGIN}" '
        f'viewBox="0 0 {wide} {HEIGHT + 2 * MARGIN}">',
        f"<style>{STYLE}</style>",
    ]
    for i, chart in enumerate(charts):
        placed = f'<svg x="{MARGIN + i * (WIDTH + GAP)}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(chart.replace("<svg ", placed, 1))
    return "\n".join([*parts, "</svg>", ""])
