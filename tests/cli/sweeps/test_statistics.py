"""Statistics of sweeps against tables, numbers worked out by hand, and a simulation."""

import math
import random

import pytest

from plait.cli.sweeps.statistics import Edge, between, edge, gaps, interval, sensitivity, t_quantile


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [
        # scipy.stats.t.ppf, as in every printed table
        (0.975, 1, 12.706204736432095),
        (0.975, 2, 4.302652729696142),
        (0.975, 3, 3.182446305284263),
        (0.975, 4, 2.7764451051977987),
        (0.975, 9, 2.2621571627409915),
        (0.95, 2, 2.919985580353725),
        (0.995, 5, 4.032142983557536),
        (0.975, 100, 1.9839715184496334),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(p: float, df: int, value: float) -> None:
    assert t_quantile(p, df) == pytest.approx(value, rel=1e-9)


def test_an_interval_worked_out_by_hand() -> None:
    # mean 2, sd 1, three values: half width 4.30265 / sqrt 3
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high == pytest.approx(2 + 4.302652729696142 / math.sqrt(3)) and found.low == pytest.approx(
        4 - found.high
    )
    assert found.holds(0.0) and not found.holds(4.5)


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert interval([5.0]).low is None and not interval([5.0]).holds(5.0)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(0)
    hits = sum(interval([rng.gauss(1, 3) for _ in range(3)]).holds(1.0) for _ in range(4000))
    # three standard deviations of a share of 95 % in 4000
    assert abs(hits / 4000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_gaps_are_paired_by_seed_and_take_only_common_seeds() -> None:
    assert gaps({0: 2.2, 1: 3.0, 7: 9.0}, {1: 2.0, 0: 2.0}) == pytest.approx([0.1, 0.5])


def test_pairing_takes_away_what_seeds_have_in_common() -> None:
    base = {seed: 2.0 + seed for seed in range(4)}
    found = interval(gaps({seed: 1.01 * loss for seed, loss in base.items()}, base))
    assert found.low == pytest.approx(0.01) and found.high == pytest.approx(0.01)


def test_sensitivity_worked_out_by_hand() -> None:
    # best 2; excesses 1, 0, min(9, 5) - 2 = 3, and 3 of the diverged one
    assert sensitivity({1e-3: 3.0, 1e-2: 2.0, 1e-1: 9.0, 1.0: None}, first_loss=5.0) == pytest.approx(7 / 4)
    assert sensitivity({1e-3: None}, first_loss=5.0) is None


def test_the_edge_lies_above_the_best_rate() -> None:
    # at the smallest rate the loss is high because little is learnt
    losses = {1e-4: [6.0, 6.1], 1e-3: [4.0, 4.1], 1e-2: [4.2, 4.3], 3e-2: [4.2, None], 1e-1: [4.3, 4.3]}
    assert edge(losses, worse=0.5) == Edge(1e-2, 3e-2)
    assert edge(losses, worse=0.2) == Edge(1e-3, 1e-2)


def test_an_edge_may_lie_beyond_the_grid_on_either_side() -> None:
    assert edge({1e-3: [4.0], 1e-2: [3.9]}, worse=0.5) == Edge(1e-2, None)
    assert edge({1e-3: [None], 1e-2: [None]}, worse=0.5) == Edge(None, 1e-3)


def test_bisection_halves_the_ratio_until_it_is_small_enough() -> None:
    assert between(Edge(1e-3, 1e-1), within=1.3) == 1e-2
    assert between(Edge(1e-2, 1.2e-2), within=1.3) is None
    assert between(Edge(1e-2, None), within=1.3) is None and between(Edge(None, 1e-2), within=1.3) is None


def test_bisection_finds_a_known_edge() -> None:
    truth, losses = 0.0123, {1e-3: [4.0], 1e-2: [3.9], 1e-1: [None]}
    while (lr := between(edge(losses, 0.5), 1.05)) is not None:
        losses[lr] = [3.95 if lr <= truth else None]
    found = edge(losses, 0.5)
    assert found.stable and found.unstable and found.stable <= truth < found.unstable <= 1.05 * found.stable
    assert len(losses) < 12
