"""The choice of one option per layer is the best there is, the one that the rule of ties names, and no other."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.compress.choice import Limit, Option, used
from plait.compress.solve import STEPS, nearest, solve

Layers = list[list[Option]]


def option(name: str, score: float, bytes: float = 0, ms: float = 0.0, **more: object) -> Option:
    return Option(name=name, score=score, uses={"bytes": bytes, "ms": ms}, **more)  # type: ignore[arg-type]


def every_choice(layers: Layers, limits: list[Limit]) -> list[tuple[Option, ...]]:
    """All choices that keep all limits and agree within families."""
    found = []
    for chosen in itertools.product(*layers):
        agreed = [o.agrees for o in chosen if o.agrees is not None]
        agrees = len(set(agreed)) == len({family for family, _ in agreed})
        if agrees and all(limit.keeps(used(limit, chosen)) for limit in limits):
            found.append(chosen)
    return found


def by_hand(layers: Layers, limits: list[Limit]) -> tuple[Option, ...] | None:
    """What `solve` should find, by looking at every choice."""
    names = sorted(limit.name for limit in limits)
    ordered = [sorted(row, key=lambda o: (o.changed, [o.uses.get(n, 0) for n in names], o.name)) for row in layers]
    choices = every_choice(ordered, limits)
    if not choices:
        return None
    least = [min(o.score for o in row) for row in ordered]

    def lost(chosen: tuple[Option, ...]) -> float:
        return math.fsum(o.score - low for o, low in zip(chosen, least, strict=True))

    best = min(map(lost, choices))
    step = 2.0 ** math.floor(math.log2(best / STEPS)) if best / STEPS > 0 else 0.0

    def units(o: Option, low: float) -> int:
        return round((o.score - low) / step) if step else int(o.score > low)

    def key(chosen: tuple[Option, ...]) -> tuple[int, int, list[int]]:
        score = sum(units(o, low) for o, low in zip(chosen, least, strict=True))
        return score, sum(o.changed for o in chosen), [r.index(o) for r, o in zip(ordered, chosen, strict=True)]

    return min(choices, key=key)


@st.composite
def problems(draw: st.DrawFn, families: bool = False) -> tuple[Layers, list[Limit]]:
    """Few layers with few options; small whole numbers, so that ties are many."""
    real = draw(st.booleans())
    scores = st.integers(0, 40).map(lambda n: n / 7) if real else st.integers(-2, 3).map(float)
    layers = []
    for i in range(draw(st.integers(1, 5))):
        row = []
        for j in range(draw(st.integers(1, 4))):
            value = draw(st.sampled_from([None, "a", "b"])) if families else None
            row.append(
                option(
                    f"{j}",
                    draw(scores),
                    draw(st.integers(0, 6)) * 1000,
                    draw(st.integers(0, 6)) * 0.1,
                    changed=j > 0,
                    agrees=None if value is None else ("odd" if i % 2 else "even", value),
                )
            )
        layers.append(row)
    limits = [
        Limit(
            name="bytes", ceiling=draw(st.integers(1, 24)) * 1000, fixed=draw(st.integers(0, 2)) * 1000, unit="bytes"
        ),
        Limit(name="ms", ceiling=draw(st.integers(1, 24)) * 0.1, unit="ms"),
    ]
    return layers, limits[: draw(st.integers(0, 2))]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_answer_is_that_of_looking_at_every_choice(problem: tuple[Layers, list[Limit]]) -> None:
    layers, limits = problem
    expected, found = by_hand(layers, limits), solve(layers, limits)
    assert (found is None) == (expected is None)
    if found is not None:
        assert [o.name for o in found.chosen] == [o.name for o in expected or ()]


@settings(max_examples=40, deadline=None)
@given(problems(families=True))
def test_families_agree_and_the_answer_is_the_best_of_those(problem: tuple[Layers, list[Limit]]) -> None:
    layers, limits = problem
    expected, found = by_hand(layers, limits), solve(layers, limits)
    assert (found and [o.name for o in found.chosen]) == (expected and [o.name for o in expected])


@settings(max_examples=25, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_options_and_limits_is_of_no_matter(
    problem: tuple[Layers, list[Limit]], rng: random.Random
) -> None:
    layers, limits = problem
    shuffled = [rng.sample(row, len(row)) for row in layers]
    a, b = solve(layers, limits), solve(shuffled, limits[::-1])
    assert (a and [o.name for o in a.chosen]) == (b and [o.name for o in b.chosen])


@settings(max_examples=25, deadline=None)
@given(problems())
def test_what_is_nearest_is_the_least_of_each_limit_under_the_others(problem: tuple[Layers, list[Limit]]) -> None:
    layers, limits = problem
    if not limits or every_choice(layers, limits):
        return
    found = nearest(layers, limits)
    expected = {}
    for limit in limits:
        choices = every_choice(layers, [other for other in limits if other is not limit])
        if choices:
            expected[limit.name] = min(used(limit, chosen) for chosen in choices)
    alone = {name: at for near in found if len(near.raised) == 1 for name, at in near.raised.items()}
    assert alone == pytest.approx(expected)
    for near in found:
        raised = [Limit(name=k.name, ceiling=near.raised.get(k.name, k.ceiling), fixed=k.fixed) for k in limits]
        best = by_hand(layers, raised)
        assert best is not None and [o.name for o in near.solution.chosen] == [o.name for o in best]
    if len(limits) > 1:
        share = min(max(used(k, chosen) / k.ceiling for k in limits) for chosen in every_choice(layers, []))
        together = found[-1].raised
        assert max(together[k.name] / k.ceiling for k in limits) == pytest.approx(share, rel=1e-3)


def test_ties_go_to_fewest_changes_and_then_to_the_first_layers() -> None:
    row = [option("keep", 0, 4, changed=False), option("half", 1, 2), option("third", 1, 2), option("none", 2, 0)]
    found = solve([row, row, row], [Limit(name="bytes", ceiling=8)])
    assert found is not None
    # one layer gone or two halved lose the same: one change is fewer, and the first layer stays as it is
    assert [o.name for o in found.chosen] == ["keep", "keep", "none"]
    found = solve([row[:3]] * 3, [Limit(name="bytes", ceiling=10)])
    assert found is not None and [o.name for o in found.chosen] == ["keep", "keep", "half"]


@pytest.mark.parametrize("n", [3, 5, 8, 11])
def test_among_many_ties_the_fewest_layers_change(n: int) -> None:
    # what one layer gives up whole, two give up by halves, four by quarters, at the same loss
    row = [option(f"{k} of 4", float(k), 4 - k, changed=k > 0) for k in range(5)]
    found = solve([row] * n, [Limit(name="bytes", ceiling=4 * n - 8)])
    assert found is not None
    assert [o.name for o in found.chosen] == ["0 of 4"] * (n - 2) + ["4 of 4"] * 2


@pytest.mark.parametrize("seed", [52, 4, 7, 11])
def test_random_ties_go_where_the_rule_says(seed: int) -> None:
    # of seed 52, the solver's own first answer changes a layer more than it must
    rng = random.Random(seed)
    layers = [
        [
            Option(
                name=str(j),
                score=float(rng.randint(0, 3)) if j else 0.0,
                uses={"b": rng.randint(0, 5) if j else 6},
                changed=j > 0,
            )
            for j in range(rng.randint(2, 5))
        ]
        for _ in range(rng.randint(3, 9))
    ][:6]
    limits = [Limit(name="b", ceiling=rng.randint(8, 30))]
    found, wanted = solve(layers, limits), by_hand(layers, limits)
    assert (found and found.chosen) == wanted


def test_prices_are_what_the_score_falls_by_per_unit() -> None:
    # every layer loses 3 for each of its 10 bytes: a byte more of room is worth 0.3
    layers = [[option("keep", 0, 10, changed=False), option("none", 3, 0)] for _ in range(6)]
    found = solve(layers, [Limit(name="bytes", ceiling=25, fixed=0), Limit(name="ms", ceiling=1.0)])
    assert found is not None and found.score == 12
    assert found.prices == pytest.approx({"bytes": 0.3, "ms": 0.0})
    assert found.used == {"bytes": 20, "ms": 0.0}


def test_whole_numbers_are_compared_to_the_last_byte() -> None:
    gib = 2**30
    layers = [[option("keep", 0.0, 22 * gib + 1, changed=False), option("less", 1e-3, 22 * gib)]]
    for ceiling, name in ((22 * gib, "less"), (22 * gib + 1, "keep")):
        found = solve(layers, [Limit(name="bytes", ceiling=ceiling)])
        assert found is not None and found.chosen[0].name == name
    assert solve(layers, [Limit(name="bytes", ceiling=22 * gib - 1)]) is None


def test_whole_numbers_are_exact_where_the_solver_is_not() -> None:
    # the ceiling is less than a billionth away, which a row of such numbers cannot tell
    tib = 2**40
    layers = [
        [option("keep", 0.0, tib + 1, changed=False), option("less", 1.0, 3)],
        [option("keep", 0.0, 7, changed=False), option("none", 5.0, 0)],
    ]
    for ceiling, name in ((tib + 7, "less"), (tib + 8, "keep")):
        found = solve(layers, [Limit(name="bytes", ceiling=ceiling)])
        assert found is not None and [o.name for o in found.chosen] == [name, "keep"]


def test_a_budget_of_exactly_what_a_model_uses_keeps_the_model() -> None:
    rng = random.Random(5)
    layers = [[option("keep", 0.0, rng.randrange(1, 10**9), rng.random(), changed=False)] for _ in range(40)]
    layers = [[*row, option("none", rng.random())] for row in layers]
    kept = tuple(row[0] for row in layers)
    limits = [Limit(name=name, ceiling=used(Limit(name=name, ceiling=0), kept)) for name in ("bytes", "ms")]
    found = solve(layers, limits)
    assert found is not None and found.chosen == kept and found.score == 0


def test_many_layers_with_many_equal_ones_are_solved_by_the_rule() -> None:
    # ten equal layers of which six must go: the last six
    layers = [[option("keep", 0.0, 10, 1.0, changed=False), option("none", 0.25, 0, 0.0)] for _ in range(10)]
    found = solve(layers, [Limit(name="bytes", ceiling=45), Limit(name="ms", ceiling=9.0)])
    assert found is not None and [o.name for o in found.chosen] == ["keep"] * 4 + ["none"] * 6


@pytest.mark.parametrize(
    ("layers", "limits", "words"),
    [
        ([], [], "nothing to choose"),
        ([[option("a", 0)], []], [], "layer 1 has no options"),
        ([[option("a", 0), option("a", 1)]], [], "two options of one name"),
        ([[option("a", float("nan"))]], [], "score=nan"),
        ([[option("a", 0, float("inf"))]], [], "bytes=inf"),
        ([[option("a", 0)]], [Limit(name="b", ceiling=1), Limit(name="b", ceiling=2)], "name of its own"),
        ([[option("a", 0)]], [Limit(name="b", ceiling=float("inf"))], "ceiling=inf"),
    ],
)
def test_what_is_no_problem_is_named(layers: Layers, limits: list[Limit], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(layers, limits)


def test_hard_limits_are_never_raised() -> None:
    layers = [[option("keep", 0, 4, changed=False), option("none", 1, 0, 1)]] * 3
    limits = [Limit(name="bytes", ceiling=2), Limit(name="ms", ceiling=2.0, hard=True)]
    assert solve(layers, limits) is None
    (near,) = nearest(layers, limits)
    # one layer must stay, and needs 4 bytes
    assert near.raised == {"bytes": 4} and near.solution.score == 2
