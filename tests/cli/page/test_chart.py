"""Charts: points land where the axes say, names do not overlap, and what cannot be drawn is refused."""

import re
import xml.etree.ElementTree as ET

import pytest

from plait.cli.page.chart import HEIGHT, LEFT, RIGHT, WIDTH, Axis, Series, line_chart

X, Y = Axis(label="tokens"), Axis(label="loss")


def drawn(*series: Series, x: Axis = X, y: Axis = Y) -> ET.Element:
    return ET.fromstring(line_chart(series, x, y, title="a < b"))


def places(svg: ET.Element, index: int = 0) -> list[tuple[float, float]]:
    line = next(e for e in svg.iter("polyline") if f"s{index}" in e.attrib["class"].split())
    pairs = (point.split(",") for point in line.attrib["points"].split())
    return [(float(a), float(b)) for a, b in pairs]


def test_linear_axes_keep_proportions() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(drawn(Series(name="a", index=0, points=[(0, 1), (1, 2), (4, 5)])))
    assert x0 == LEFT and x2 == WIDTH - RIGHT
    assert (x1 - x0) * 4 == pytest.approx(x2 - x0) and (y0 - y1) * 4 == pytest.approx(y0 - y2, abs=0.4)


def test_logarithmic_axes_give_equal_ratios_equal_room() -> None:
    axis = Axis(label="context", is_log=True, ticks=(1, 10, 100))
    svg = drawn(Series(name="a", index=0, points=[(1, 1), (10, 2), (100, 4)]), x=axis, y=Axis(label="y", is_log=True))
    (x0, y0), (x1, y1), (x2, y2) = places(svg)
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_an_axis_from_zero_shows_true_proportions() -> None:
    svg = drawn(Series(name="a", index=0, points=[(0, 50), (1, 100)]), y=Axis(label="speed", from_zero=True))
    (_, low), (_, high) = places(svg)
    floor = HEIGHT - 38
    assert (floor - low) * 2 == pytest.approx(floor - high, abs=0.3)
    assert "0" in {e.text for e in svg.iter("text")}


def test_names_at_line_ends_do_not_overlap() -> None:
    svg = drawn(*(Series(name=f"n{i}", index=i, points=[(0, 1), (1, 2 + i / 100)]) for i in range(2)))
    heights = sorted(float(e.attrib["y"]) for e in svg.iter("text") if e.attrib["class"].startswith("name"))
    assert heights[1] - heights[0] >= 14.9


def test_words_are_escaped() -> None:
    text = line_chart([Series(name="<b>", index=0, points=[(0, 1)])], Axis(label="a & b"), Y, title='"')
    assert "<b>" not in text and ET.fromstring(text) is not None


def test_a_single_point_and_a_flat_line_are_drawn() -> None:
    assert places(drawn(Series(name="a", index=0, points=[(3, 7)])))
    assert len(places(drawn(Series(name="a", index=0, points=[(0, 2), (1, 2)])))) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="loss"):
        drawn(Series(name="a", index=0, points=[(0, value)]))


def test_a_logarithm_of_zero_and_an_empty_chart_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot show"):
        drawn(Series(name="a", index=0, points=[(0, 1)]), x=Axis(label="x", is_log=True))
    with pytest.raises(ValueError, match="no points"):
        line_chart([Series(name="a", index=0, points=[])], X, Y, title="t")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.1, 3.4), (100, 90000), (1e-9, 2e-9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    svg = drawn(Series(name="a", index=0, points=[(0, low), (1, high)]))
    lines = [e for e in svg.iter("line")]
    assert 2 <= len(lines) <= 7
    assert all(0 < float(e.attrib["y1"]) < HEIGHT for e in lines)
    assert not re.search("nan|inf", ET.tostring(svg, encoding="unicode"))
