"""The bench of predicted times: its statistics against values by hand, its architectures, and a run of two."""

import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from plait.cli.bench import Inputs
from plait.cli.benches import latency
from plait.cli.benches.latency import draw, judge, measure, random_config, rank_correlation
from plait.model.hybrid import build
from plait.report import Report


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 200, 3000, 40000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 (1 + 1) / (5 x 24)
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(0.9)
    # with ties, the coefficient of the mean ranks 1.5, 1.5, 3 and 1, 2, 3
    assert rank_correlation([7, 7, 9], [1, 2, 3]) == pytest.approx(0.75**0.5)
    assert str(rank_correlation([1, 1], [1, 2])) == "nan"


def test_errors_are_judged_by_their_median() -> None:
    report = Report("test")
    judge(report, "decode", [(1.0, 1.0), (2.2, 2.0), (3.0, 4.0), (5.0, 5.0), (6.0, 6.6)])
    facts = {fact.name: fact.value for fact in report.facts}
    assert facts["decode, error"] == pytest.approx(1 - 6 / 6.6)
    assert facts["decode, rank correlation"] == pytest.approx(1.0)
    assert facts["decode, error at most 10% and correlation at least 0.95"] == "yes"
    judge(report, "prefill", [(1.0, 2.0), (2.0, 1.0)])
    assert report.facts[-1].value == "no"


def test_architectures_differ_and_can_be_built() -> None:
    rng = random.Random(0)
    configs = [random_config(rng) for _ in range(30)]
    assert len(set(configs)) == 30 and {c.d_model for c in configs} == {256, 384, 512}
    assert any(len({spec for spec in c.layers if spec.symbol == "M"}) > 1 for c in configs)
    build(configs[0])


def test_the_bench_predicts_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # small models, whose blocks are repeated a few times only
    monkeypatch.setattr(latency, "VOCAB", 64)
    monkeypatch.setattr(latency, "WIDTHS", (64,))
    monkeypatch.setattr(latency, "read_bytes", lambda config, load, weights: 1)
    library, chart = tmp_path / "blocks.jsonl", tmp_path / "chart.svg"
    inputs = Inputs(what="latency", count=1, rounds=1, tokens=(9,), library=str(library), chart=str(chart))
    facts = {fact.name: fact for fact in measure(inputs).facts}
    known = len(library.read_text().splitlines())
    assert facts["blocks measured"].value == known > 3
    assert {"prefill, error", "decode, error", "decode, rank correlation"} <= set(facts)
    # the second time all blocks are known
    assert {fact.name: fact for fact in measure(inputs).facts}["blocks measured"].value == 0
    assert len(library.read_text().splitlines()) == known
    assert ElementTree.fromstring(chart.read_text()).tag.endswith("svg")


def test_the_picture_has_a_point_for_every_architecture() -> None:
    root = ElementTree.fromstring(draw({"decode": [(0.001, 0.002), (0.003, 0.004), (0.002, 0.002)]}))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3
