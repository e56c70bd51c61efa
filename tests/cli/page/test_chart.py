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


def test_a_band_and_its_line_share_the_axes() -> None:
    svg = drawn(Series(name="a", index=0, points=[(0, 2), (1, 2)], band=[(0, 1, 3), (1, 0, 4)]))
    corners = next(svg.iter("polygon")).attrib["points"].split()
    (x0, top0), (x1, top1), (x2, low1), (x3, low0) = (tuple(map(float, corner.split(","))) for corner in corners)
    line = places(svg)
    assert (x0, x1, x2, x3) == (line[0][0], line[1][0], line[1][0], line[0][0])
    middle = line[0][1]
    assert middle - top0 == pytest.approx(low0 - middle, abs=0.2) and middle - top1 == pytest.approx(
        2 * (middle - top0), abs=0.3
    )


def test_crosses_stand_above_the_axes_and_do_not_move_them() -> None:
    svg = drawn(Series(name="a", index=0, points=[(0, 2), (1, 3)], crosses=[2.0]))
    cross = next(e for e in svg.iter("path") if "cross" in e.attrib["class"])
    x, y = map(float, re.match(r"M([\d.]+),([\d.]+)", cross.attrib["d"]).groups())
    assert x + 4 == pytest.approx(WIDTH - RIGHT, abs=0.2) and y + 8 < min(b for _, b in places(svg))


def test_crosses_of_several_lines_get_a_row_each_and_the_axes_make_room() -> None:
    svg = drawn(*(Series(name="", index=i, points=[(0, 2), (1, 3 + i)], crosses=[2.0]) for i in range(4)))
    found = [e.attrib["d"] for e in svg.iter("path") if "cross" in e.attrib["class"]]
    lowest = sorted(float(place.split(",")[1].partition("l")[0]) + 8 for place in found)
    assert all(b - a >= 8 for a, b in zip(lowest, lowest[1:], strict=False))
    assert lowest[-1] < min(b for i in range(4) for _, b in places(svg, i))


def test_lines_that_end_at_different_places_are_named_in_one_column() -> None:
    svg = drawn(*(Series(name=f"n{i}", index=i, points=[(0, 1), (1 + i, 2 + i)]) for i in range(3)))
    names = [e for e in svg.iter("text") if e.attrib["class"].startswith("name")]
    assert len({e.attrib["x"] for e in names}) == 1
    heights = sorted(float(e.attrib["y"]) for e in names)
    assert all(b - a >= 14.9 for a, b in zip(heights, heights[1:], strict=False))


def test_many_names_at_one_place_do_not_overlap() -> None:
    svg = drawn(*(Series(name=f"n{i}", index=i, points=[(0, 1), (1, 2 + (i == 7))]) for i in range(8)))
    heights = sorted(float(e.attrib["y"]) for e in svg.iter("text") if e.attrib["class"].startswith("name"))
    assert all(b - a >= 14.9 for a, b in zip(heights, heights[1:], strict=False))


def test_long_names_get_their_room() -> None:
    svg = drawn(Series(name="a method of a long name", index=0, points=[(0, 1), (1, 2)]))
    assert places(svg)[1][0] + 8 + 7 * len("a method of a long name") < WIDTH


def test_colours_come_round_dashed() -> None:
    svg = drawn(Series(name="a", index=0, points=[(0, 1)]), Series(name="b", index=8, points=[(0, 2)]))
    classes = [e.attrib["class"].split() for e in svg.iter("polyline")]
    assert classes == [["line", "s0"], ["line", "s0", "dashed"]]
