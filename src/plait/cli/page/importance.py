"""Draws what every layer of a model is worth: a bar per layer, in the colour of its kind, hollow for those that go.

Colours are those of patterns on the page: Mamba-2, attention, feed-forward, experts.
"""

from collections.abc import Collection, Sequence

from markupsafe import escape

from plait.cli.page.chart import BOTTOM, LEFT, TOP, Axis, Scale

KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "experts"}
NAMES = {"M": "Mamba-2", "*": "attention", "-": "feed-forward", "E": "experts"}
WIDTH, HEIGHT = 760, 250
# share of a layer's room that its bar takes
BAR = 0.76
# of a logarithmic axis, at most: what does nothing would stretch it beyond use
DECADES = 6


def importance_chart(
    pattern: str,
    values: Sequence[float],
    *,
    title: str,
    label: str,
    gone: Collection[int] = (),
    is_log: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Draw the layers of a model by importance.

    Args:
        pattern: a letter per layer.
        values: a number per layer; on a logarithmic axis those that are not positive have no bar.
        title: read out where the drawing cannot be seen.
        label: what the values are.
        gone: layers that are to be removed, drawn hollow.
        is_log: logarithmic axis.
        width, height: of the drawing.

    Raises: ValueError for another number of values than layers, or none that can be shown.
    """
    if len(values) != len(pattern) or not pattern:
        raise ValueError(f"chart {title!r} has {len(values)} values for {len(pattern)} layers")
    shown = [value for value in values if value > 0 or not is_log]
    if not shown:
        raise ValueError(f"chart {title!r}: no value is above zero")
    bottom, right = height - BOTTOM, width - 4
    if is_log:
        low = max(min(shown), max(shown) / 10**DECADES) / 2
        up = Scale(Axis(label=label, is_log=True), [low, max(shown)], bottom, TOP, room=0.02)
    else:
        up = Scale(Axis(label=label), [0.0, *shown], bottom, TOP, room=0.02)
    zero = up.begin if is_log else up(0.0)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="0" y="12">{escape(label)}{", logarithmic" if is_log else ""}</text>',
        *_legend(pattern, right),
    ]
    for tick in up.ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    room = (right - LEFT) / len(pattern)
    for layer, (letter, value) in enumerate(zip(pattern, values, strict=True)):
        x = LEFT + room * (layer + (1 - BAR) / 2)
        if value > 0 or not is_log:
            end = min(max(up(value), TOP - 4), up.begin)
            top, tall = min(end, zero), max(abs(zero - end), 0.5)
            kind = f"{KINDS[letter]}{' gone' if layer in gone else ''}"
            words = f"layer {layer}, {NAMES[letter]}: {value:.3g}{', removed' if layer in gone else ''}"
            parts.append(
                f'<rect class="bar {kind}" x="{x:.1f}" y="{top:.1f}" width="{room * BAR:.1f}" height="{tall:.1f}">'
                f"<title>{escape(words)}</title></rect>"
            )
        if layer % max(len(pattern) // 12, 1) == 0:
            middle = LEFT + room * (layer + 0.5)
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{bottom + 16}" text-anchor="middle">{layer}</text>')
    parts.append(f'<line class="zero" x1="{LEFT}" x2="{right}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    parts.append(f'<text class="axis" x="{right}" y="{height - 4}" text-anchor="end">layer</text>')
    return "".join([*parts, "</svg>"])


def _legend(pattern: str, right: float) -> list[str]:
    """The kinds that there are, from the right."""
    parts: list[str] = []
    for letter in reversed([letter for letter in KINDS if letter in pattern]):
        parts.append(f'<text class="tick" x="{right:.1f}" y="12" text-anchor="end">{NAMES[letter]}</text>')
        right -= 8.6 * len(NAMES[letter]) + 16
        parts.append(f'<rect class="bar {KINDS[letter]}" x="{right:.1f}" y="3" width="10" height="10"/>')
        right -= 14
    return parts
