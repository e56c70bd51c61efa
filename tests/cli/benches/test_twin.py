"""The chart of the hybrid and its twin: a picture by itself, with a point for every measurement."""

import xml.etree.ElementTree as ElementTree

from plait.cli.benches.twin import draw

SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_is_an_svg_file_with_every_point() -> None:
    depths = (0, 4096, 32768)
    rates = {
        "hybrid": [(float(d), 50.0 - d / 1e4) for d in depths],
        "Llama": [(float(d), 60 - d / 1e3) for d in depths],
    }
    sizes = {"hybrid": [(float(d), 1e7 + d) for d in depths], "Llama": [(float(d), 18e3 * d) for d in depths]}
    root = ElementTree.fromstring(draw(rates, sizes))
    assert root.tag == f"{SVG}svg" and root.get("viewBox")
    charts = root.findall(f"{SVG}svg")
    assert len(charts) == 2
    for chart in charts:
        assert len(chart.findall(f"{SVG}circle")) == 2 * len(depths)
        lines = chart.findall(f"{SVG}polyline")
        assert [len(line.get("points", "").split()) for line in lines] == [3, 3]
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"hybrid", "Llama", "tokens/s", "cache, MB", "tokens of context", "32k", "8k", "0"} <= words


def test_the_chart_has_colours_for_light_and_dark() -> None:
    text = draw({"hybrid": [(0.0, 1.0), (8.0, 2.0)]}, {"hybrid": [(0.0, 1.0), (8.0, 2.0)]})
    assert "prefers-color-scheme: dark" in text and 'fill="' not in text
