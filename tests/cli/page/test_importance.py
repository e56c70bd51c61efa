"""Importance of layers: a bar as tall as the value, in its kind's colour, hollow where the layer goes."""

import xml.etree.ElementTree as ET

import pytest

from plait.cli.page.importance import importance_chart


def bars(svg: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter("rect") if e.find("title") is not None]


def test_bars_are_as_tall_as_their_values_and_coloured_by_kind() -> None:
    drawn = bars(importance_chart("M*-E", [1.0, 4.0, 2.0, 0.0], title="a < b", label="error", gone={2}))
    tall = [float(bar.attrib["height"]) for bar in drawn]
    assert tall[1] == pytest.approx(4 * tall[0], rel=0.02) and tall[2] == pytest.approx(2 * tall[0], rel=0.02)
    kinds = [bar.attrib["class"] for bar in drawn]
    assert kinds == ["bar mamba", "bar attention", "bar mlp gone", "bar experts"]
    assert drawn[2].findtext("title") == "layer 2, feed-forward: 2, removed"


def test_a_decade_is_a_decade_on_a_logarithmic_axis_and_nothing_has_no_bar() -> None:
    drawn = bars(importance_chart("MM-M", [1e-2, 1e-1, 1.0, 0.0], title="t", label="error", is_log=True))
    tops = [float(bar.attrib["y"]) for bar in drawn]
    assert len(tops) == 3 and tops[0] - tops[1] == pytest.approx(tops[1] - tops[2], abs=0.2)


def test_bars_below_zero_hang_from_it() -> None:
    up, down = bars(importance_chart("MM", [1.0, -1.0], title="t", label="rise"))
    assert float(up.attrib["y"]) + float(up.attrib["height"]) == pytest.approx(float(down.attrib["y"]), abs=0.2)


def test_only_kinds_that_are_there_are_named() -> None:
    words = {e.text for e in ET.fromstring(importance_chart("M-", [1, 2], title="t", label="x")).iter("text")}
    assert {"Mamba-2", "feed-forward"} <= words and "attention" not in words


@pytest.mark.parametrize(("pattern", "values", "log"), [("MM", [1.0], False), ("", [], False), ("M", [0.0], True)])
def test_what_cannot_be_drawn_is_refused(pattern: str, values: list[float], log: bool) -> None:
    with pytest.raises(ValueError, match="chart 't'"):
        importance_chart(pattern, values, title="t", label="x", is_log=log)
