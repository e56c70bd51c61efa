"""The page of a run's telemetry: every figure is drawn, whatever is missing or not finite."""

import json
import re
from pathlib import Path

import pytest

from plait.cli.page import inside
from plait.cli.page.blocks import Chart
from plait.report import provenance

MAMBA = ("in_proj.l2", "out_proj.l2", "state.norm", "state.max", "gate.closed", "gate.open")
SPREAD = {"dt": (0.001, 0.002, 0.01, 0.05, 0.1), "decay": (0.1, 0.5, 0.9, 0.99, 1.0)}


def row(step: int, n_layers: int = 2) -> dict[str, object]:
    """A hybrid of layers M and *."""
    figures: dict[str, object] = {}
    heads: dict[str, object] = {}
    for i in range(0, 2 * n_layers, 2):
        figures |= {f"blocks.{i}.{name}": 0.1 * (i + step) for name in MAMBA}
        for name, values in SPREAD.items():
            figures |= {f"blocks.{i}.{name}.p{p}": v for p, v in zip((0, 5, 50, 95, 100), values, strict=True)}
            heads[f"blocks.{i}.{name}"] = [[v * (h + 1) / 3 for v in values] for h in (2, 0, 1)]
        heads |= {f"blocks.{i}.{name}": [0.3, 0.1, 0.2] for name in ("state.norm", "gate.closed", "gate.open")}
        figures |= {f"blocks.{i + 1}.{name}": 2.0 * step for name in ("qkv.l2", "proj.l2", "max_logit", "entropy")}
    return {"step": step, "skipped": 0, "seconds": 0.01, "figures": figures, "heads": heads}


def charts(rows: list[dict[str, object]]) -> dict[str, str]:
    found = [block for section in inside.sections(rows) for block in section.blocks]
    assert all(isinstance(block, Chart) for block in found)
    return {block.title: block.svg for block in found}  # type: ignore[attr-defined]


def test_every_figure_has_a_chart() -> None:
    found = charts([row(10), row(20)])
    words = {"QKV", "Proj", "logit", "Entropy", "input projection", "Norm of SSM", "Largest number", "Gates closed"}
    for word in {*words, "dt: median", "exp(dt A): median", "dt by head", "decay", "state by head", "open by head"}:
        assert any(word.lower() in title.lower() for title in found), word
    assert all(svg.startswith("<svg") and "nan" not in svg for svg in found.values())
    # one line per Mamba-2 layer, each with its band
    drawn = next(svg for title, svg in found.items() if title.startswith("Time step dt: median"))
    assert len(re.findall("layer [02]<", drawn)) == 2 and drawn.count('class="band') == 2


def test_heads_stand_in_the_order_of_their_medians() -> None:
    drawn = charts([row(1)])["Time step dt by head"]
    line = re.search(r'class="line s0" points="([^"]+)"', drawn)
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line[1].split()]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True)


def test_of_many_layers_some_are_named_and_all_are_drawn() -> None:
    drawn = charts([row(1, 20), row(2, 20)])["Outputs of Mamba-2's input projection"]
    assert drawn.count("<polyline") == 20 and re.findall(r">layer (\d+)<", drawn) == ["0", "12", "26", "38"]


def test_ternary_layers_show_the_mean_over_their_projections() -> None:
    rows = [row(1), row(2)]
    for i, one in enumerate(rows):
        for name, value in (("mixer.in_proj", 0.3), ("mixer.out_proj", 0.5 + i), ("mixer.shared.up_proj", 0.4)):
            one["figures"][f"blocks.0.{name}.w.zeros"] = value  # type: ignore[index]
    assert inside._layers(rows, "w.zeros") == {0: [(1.0, pytest.approx(0.4)), (2.0, pytest.approx(2.2 / 3))]}
    found = charts(rows)
    assert "Codes that are zero" in found and "Codes that flipped since the last look" not in found


def test_what_is_not_finite_is_left_out() -> None:
    bad = row(2)
    bad["figures"]["blocks.1.max_logit"] = "inf"  # type: ignore[index]
    bad["heads"]["blocks.0.dt"][0][2] = "nan"  # type: ignore[index]
    found = charts([row(1), bad])
    assert all("nan" not in svg and "inf" not in svg for svg in found.values())


def test_an_end_of_a_band_that_is_not_finite_moves_no_other() -> None:
    rows = [row(step) for step in (1, 2, 3)]
    rows[0]["figures"]["blocks.0.dt.p95"] = "inf"  # type: ignore[index]
    drawn = next(svg for title, svg in charts(rows).items() if title.startswith("Time step dt: median"))
    bands = [each.split() for each in re.findall(r'<polygon class="band s\d" points="([^"]+)"', drawn)]
    # there and back over two steps and over three, which end at the same places
    assert [len(band) for band in bands] == [4, 6] and bands[0][0].split(",")[0] == bands[1][1].split(",")[0]


def test_the_page_shows_what_stands_of_a_run_that_was_killed_and_went_back(tmp_path: Path) -> None:
    lines = [json.dumps(row(step)) for step in (1, 2, 3, 2)]
    (tmp_path / "telemetry.jsonl").write_text("\n".join([*lines, '{"step": 4, "torn']))
    assert inside.write(tmp_path, "run", provenance(0)) is not None
    assert "2 looks inside the model" in (tmp_path / "telemetry.html").read_text()


def test_the_page_lies_in_the_run_and_only_where_there_is_telemetry(tmp_path: Path) -> None:
    assert inside.write(tmp_path, "run", {}) is None
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(row(s)) + "\n" for s in (1, 2)))
    assert inside.write(tmp_path, "run <1>", provenance(0)) == tmp_path / "telemetry.html"
    text = (tmp_path / "telemetry.html").read_text()
    assert "run &lt;1&gt;" in text and "2 looks inside the model, 0.02 s" in text
