"""Means with intervals: dots between their ends, zero always in sight, missing values named."""

import xml.etree.ElementTree as ET

import pytest

from plait.cli.page.chart import WIDTH, Axis
from plait.cli.page.intervals import Row, interval_chart

AXIS = Axis(label="gap")


def drawn(*rows: Row) -> ET.Element:
    return ET.fromstring(interval_chart(rows, AXIS, title="a < b"))


def test_a_dot_lies_between_its_ends_in_proportion() -> None:
    svg = drawn(Row(name="a", index=0, value=2.0, low=1.0, high=4.0))
    dot = float(next(svg.iter("circle")).attrib["cx"])
    bar = next(e for e in svg.iter("line") if "s0" in e.attrib["class"].split())
    low, high = float(bar.attrib["x1"]), float(bar.attrib["x2"])
    assert (dot - low) * 2 == pytest.approx(high - dot, abs=0.3)


def test_zero_is_on_the_axis_and_lies_left_of_what_is_above_it() -> None:
    svg = drawn(Row(name="a", index=0, value=5.0))
    zero = next(e for e in svg.iter("line") if e.attrib["class"] == "zero")
    assert 0 < float(zero.attrib["x1"]) < float(next(svg.iter("circle")).attrib["cx"]) <= WIDTH


def test_a_row_without_a_value_says_why() -> None:
    svg = drawn(Row(name="a", index=0, value=1.0), Row(name="b <", index=1, value=None, word="diverged"))
    assert "diverged" in {e.text for e in svg.iter("text")} and len(list(svg.iter("circle"))) == 1


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        drawn(Row(name="a", index=0, value=None))
