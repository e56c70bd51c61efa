"""Measuring in turns: medians, ratios round by round, peers that fail, results that disagree."""

import math
import statistics

import pytest
import torch

from plait.cli.benches.sides import (
    DisagreementError,
    add_median,
    add_ratio,
    add_share,
    alternate,
    require_equal,
    timed,
)
from plait.report import Report


def test_sides_take_turns_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def side(name: str, value: float):  # noqa: ANN202
        def run() -> float:
            order.append(name)
            return value + order.count(name)

        return run

    found = alternate({"plait": side("plait", 10), "peer": side("peer", 20)}, 3)
    assert order == ["plait", "peer"] * 4
    assert found == {"plait": [12, 13, 14], "peer": [22, 23, 24]}


def test_a_peer_that_fails_is_named_and_left_out() -> None:
    def fails() -> float:
        raise RuntimeError("first\nno such model")

    report = Report("bench")
    assert alternate({"plait": lambda: 1.0, "peer": fails}, 2, label="x", report=report) == {"plait": [1.0, 1.0]}
    assert [(fact.name, fact.value) for fact in report.facts] == [("x peer", "failed: no such model")]


def test_a_peer_may_fail_in_a_later_round() -> None:
    calls: list[int] = []

    def fails() -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("tired")
        return 1.0

    report = Report("bench")
    assert alternate({"plait": lambda: 2.0, "peer": fails}, 4, report=report) == {"plait": [2.0] * 4}
    assert report.facts[0].value == "failed: tired"


def test_our_own_failure_is_an_error() -> None:
    def fails() -> float:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        alternate({"plait": fails}, 2, report=Report("bench"))


def test_a_side_that_takes_long_does_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds: float):  # noqa: ANN202
        def run() -> float:
            clock[0] += seconds
            return seconds

        return run

    sides = {"plait": takes(1.0), "slow": takes(2.5), "slower": takes(9.0), "endless": takes(100.0)}
    found = alternate(sides, 5, budget_s=10.0)
    assert {name: len(values) for name, values in found.items()} == {"plait": 5, "slow": 4, "slower": 2, "endless": 1}
    # the run of warming up counts where it takes a large part of the budget
    assert clock[0] == 6 * 1.0 + 5 * 2.5 + 2 * 9.0 + 100.0


def test_a_mean_of_repeats_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += 0.5

    assert timed(run, 4)() == 0.5 and clock[0] == 2.0


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.2]), torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_results_that_disagree_are_an_error(wrong: torch.Tensor) -> None:
    right = torch.tensor([1.0, 2.0])
    # |(0, 0.2)| / |(1, 2)|
    assert require_equal("logits", torch.tensor([1.0, 2.2]), right, 0.1) == pytest.approx(0.2 / 5**0.5)
    with pytest.raises(DisagreementError, match="logits"):
        require_equal("logits", wrong, right, 0.05)


def test_figures_are_medians_with_their_spread() -> None:
    report = Report("bench")
    assert add_median(report, "speed", [1.0, 9.0, 2.0], "tokens/s") == 2.0
    assert add_ratio(report, "ratio", [2.0, 6.0, 9.0], [1.0, 2.0]) == 2.5
    # 10 tokens/s of 3 bytes are 30 of 40 bytes/s
    assert add_share(report, "share", [10.0], 3.0, [40.0]) == 0.75
    speed, ratio, share = report.facts
    assert speed.n == 3 and speed.spread == statistics.stdev([1.0, 9.0, 2.0])
    assert ratio.n == 2 and ratio.unit == "x"
    assert share.spread is None
