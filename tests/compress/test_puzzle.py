"""Puzzle finds the best model of different layers under all limits, and says what there is when there is none."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.compress.teachers import config

from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs, Load
from plait.compress.explain import enough, explain
from plait.compress.pareto import front
from plait.compress.puzzle import Problem, Puzzle, nearest_budgets, require, search
from plait.compress.replace import KEEP, Menu, library
from plait.compress.roofline import Roofline
from plait.compress.single import Harm
from plait.model.plan import MACHINES

TEACHER = config("M-*M-")
COSTS = Costs(load=Load(context=512), clock=Roofline(machine=MACHINES["h100"]))
OFFERED = library(TEACHER, Menu(d_ff=(0.5,), n_heads=(0.67,), d_state=(), n_kv_heads=(0.34,)))


def harm(layer: int, name: str) -> Harm:
    """Some harm for each: nothing is worst, and layers differ."""
    if name == KEEP:
        return Harm(kl=0.0, loss=0.0)
    weight = {"none": 1.0, "attention": 0.35, "mamba-2": 0.3}.get(name, 0.11)
    return Harm(kl=weight * (1 + math.sin(3 * layer + 1) ** 2), loss=weight * (1 + math.cos(layer) ** 2))


PROBLEM = Problem(
    teacher=TEACHER,
    replacements=OFFERED,
    table={(r.layer, r.name): harm(r.layer, r.name) for row in OFFERED for r in row},
    weights=Path("weights"),
    costs=COSTS,
    widths={16: Harm(kl=0.03, loss=0.02)},
)
TOTAL = COSTS.total(TEACHER)


def by_hand(problem: Problem, budget: Budget) -> float | None:
    """The least harm over every choice for every width, verdict by verdict."""
    best = None
    narrower = {d: getattr(harm, problem.by) for d, harm in (problem.widths or {}).items()}
    for d_model, base in ({20: 0.0} | narrower).items():
        for chosen in itertools.product(*OFFERED):
            specs = [r.spec for r in chosen if r.spec is not None]
            kinds = {spec.symbol for spec in specs}
            if not specs or (problem.homogeneous and len(kinds) < len(set(specs))):
                continue
            if budget.verdict(replace(TEACHER, layers=tuple(specs), d_model=d_model), COSTS).ok:
                score = base + sum(getattr(problem.table[r.layer, r.name], problem.by) for r in chosen)
                best = score if best is None else min(best, score)
    return best


def budget_of(memory: float, speed: float) -> Budget:
    return Budget(total_bytes=TOTAL.total_bytes * memory, min_speedup=speed).against(TOTAL)


def test_layers_of_a_kind_are_alike_if_asked_and_need_not_be_otherwise() -> None:
    budget = Budget(params=int(TOTAL.params * 0.85))
    problem = replace(PROBLEM, widths=None)
    free, alike = search(problem, budget), search(replace(problem, homogeneous=True), budget)
    assert "layers" in free.plan.config.to_dict() and "layers" not in alike.plan.config.to_dict()
    assert free.score < alike.score
    for found, homogeneous in ((free, False), (alike, True)):
        wanted = by_hand(replace(problem, homogeneous=homogeneous), budget)
        assert found.score == pytest.approx(wanted, rel=1e-6)


def test_a_narrower_model_is_taken_where_it_harms_less() -> None:
    found = search(PROBLEM, Budget(params=int(TOTAL.params * 0.79)))
    assert found.plan.config.d_model == 16 and found.base == 0.03 and found.widths[20] > found.score  # type: ignore[operator]


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize(("memory", "speed"), [(0.9, 1.05), (0.75, 1.2), (0.6, 1.4)])
def test_the_plan_is_the_best_within_the_budget(memory: float, speed: float, homogeneous: bool) -> None:
    problem, budget = replace(PROBLEM, homogeneous=homogeneous), budget_of(memory, speed)
    found = search(problem, budget)
    assert found.score == pytest.approx(by_hand(problem, budget), rel=1e-6)
    assert budget.verdict(found.plan.config, COSTS).ok
    total = COSTS.total(found.plan.config)
    assert found.solution.used["total_bytes"] == total.total_bytes
    assert found.solution.used["decode_s"] == pytest.approx(total.decode_s, rel=1e-12)
    if homogeneous:
        assert "layers" not in found.plan.config.to_dict()


def test_another_harm_gives_another_answer() -> None:
    problem, budget = replace(PROBLEM, by="loss"), budget_of(0.75, 1.2)
    assert search(problem, budget).score == pytest.approx(by_hand(problem, budget), rel=1e-6)


def test_a_budget_that_the_teacher_keeps_gives_the_teacher() -> None:
    found = search(PROBLEM, budget_of(1.0, 1.0))
    assert found.plan.config == TEACHER and not found.plan.replaced and found.score == 0


def test_a_billionth_of_a_time_is_no_breach_but_a_byte_is() -> None:
    for over, ok in ((1e-12, True), (1e-8, False)):
        assert Budget(decode_s=TOTAL.decode_s * (1 - over)).verdict(TEACHER, COSTS).ok == ok
    assert TOTAL.total_bytes == int(TOTAL.total_bytes)
    assert not Budget(total_bytes=TOTAL.total_bytes - 1).verdict(TEACHER, COSTS).ok


def test_the_plan_names_the_files_of_what_was_replaced() -> None:
    found = search(PROBLEM, budget_of(0.75, 1.2))
    learnt = {r.layer: r.file(Path("weights")) for r in found.chosen if r.learns}
    assert found.plan.replaced == learnt and learnt
    assert found.plan.kept == tuple(r.layer for r in found.chosen if r.spec is not None)


def test_where_nothing_fits_the_nearest_budgets_are_told_and_can_be_kept() -> None:
    # half the cache and ten times the speed: neither is possible
    budget = budget_of(0.05, 30.0)
    with pytest.raises(BudgetError, match="nearest that is possible") as error:
        search(PROBLEM, budget)
    near = nearest_budgets(PROBLEM, budget)
    assert near and all(name in str(error.value) for name in ("total_bytes", "decode_s", "nats a token"))
    for one in near:
        raised = replace(budget, **one.raised)
        assert search(PROBLEM, raised).score == pytest.approx(one.solution.score, rel=1e-6)
        # and a thousandth less is too little
        with pytest.raises(BudgetError):
            search(PROBLEM, replace(budget, **{name: at * 0.999 for name, at in one.raised.items()}))


@pytest.fixture(scope="module")
def answer() -> Puzzle:
    return search(PROBLEM, budget_of(0.35, 1.8))


def test_the_explanation_weighs_every_option_at_the_prices(answer: Puzzle) -> None:
    told = explain(answer, TEACHER)
    assert len(told.layers) == len(OFFERED)
    for why in told.layers:
        assert [a.price for a in why.alternatives] == sorted(a.price for a in why.alternatives)
    for why, row, chosen in zip(told.layers, OFFERED, answer.chosen, strict=True):
        assert sorted(a.name for a in why.alternatives) == sorted(r.name for r in row)
        assert [a.name for a in why.alternatives if a.chosen] == [chosen.name]
        for a in why.alternatives:
            spent = sum(answer.solution.prices[name] * use for name, use in a.uses.items())
            assert a.score == PROBLEM.table[why.layer, a.name].kl and a.price == pytest.approx(a.score + spent)
    # most layers take what is cheapest at the prices; whole options cannot always
    cheapest = [why.alternatives[0].chosen for why in told.layers]
    assert sum(cheapest) >= len(cheapest) - len(answer.limits)
    text = told.text()
    assert "total_bytes" in text and "next best" in text and text.count("layer ") == len(OFFERED)
    assert all(r.name in told.text(layer=0) for r in OFFERED[0])
    data = told.to_dict()
    assert data["score"] == answer.score and len(data["layers"]) == len(OFFERED)  # type: ignore[arg-type]


def test_a_front_falls_with_its_ceiling_and_shows_where_it_ends() -> None:
    points = front(PROBLEM, "total_bytes", shares=(1.0, 0.8, 0.6, 0.01))
    assert [p.score for p in points[:3]] == sorted(p.score or 0.0 for p in points[:3])
    assert points[0].score == 0 and points[-1].score is None and points[-1].plan is None
    for p in points[:3]:
        assert p.costs is not None and p.costs.total_bytes <= p.ceiling
        assert p.score == pytest.approx(by_hand(PROBLEM, Budget(total_bytes=p.ceiling)), rel=1e-6)
    assert points[1].to_dict()["pattern"] == points[1].plan.config.pattern  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="limit='speed' is unknown"):
        front(PROBLEM, "speed")


def test_times_need_a_clock() -> None:
    with pytest.raises(ValueError, match="needs a clock"):
        search(replace(PROBLEM, costs=Costs()), Budget(decode_s=1.0))


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(9646.0, "", "9,646"), (1501000, "bytes", "1.432 MiB"), (2**20, "bytes", "1 MiB"), (4.6451e-7, "s", "464.6 ns")],
)
def test_what_is_enough_is_never_rounded_down(value: float, unit: str, words: str) -> None:
    assert enough(value, unit) == words


@pytest.mark.parametrize(("memory", "speed"), [(0.9, 1.05), (0.3, 1.2), (0.9, 9.0), (0.05, 1.0)])
def test_what_nothing_keeps_is_refused_before_anything_is_made(memory: float, speed: float) -> None:
    budget = Budget(total_bytes=int(TOTAL.total_bytes * memory), min_speedup=speed)

    def refused(ask: Callable[[], object]) -> str:
        try:
            ask()
        except BudgetError as error:
            return str(error)
        return ""

    early = refused(lambda: require(TEACHER, OFFERED, [16], budget, COSTS))
    late = refused(lambda: search(PROBLEM, budget))
    assert bool(early) == bool(late) and "loses" not in early
    if late and memory > 0.1:
        # the same nearest budgets, without what is not known yet
        assert early == re.sub(r", which loses about \S+ nats a token", "", late) != late


def test_a_clock_is_not_asked_where_time_is_not_limited() -> None:
    class Broken(Roofline):
        def layer(self, *_: object) -> tuple[float, float]:  # type: ignore[override]
            raise AssertionError("asked")

        rest = layer  # type: ignore[assignment]

    costs = replace(COSTS, clock=Broken(machine=MACHINES["h100"]))
    budget = Budget(params=int(TOTAL.params * 0.85))
    require(TEACHER, OFFERED, [16], budget, costs)
    assert search(replace(PROBLEM, costs=costs), budget).score == search(PROBLEM, budget).score
    # what is too large is refused without waiting for measurements
    with pytest.raises(BudgetError, match="params"):
        require(TEACHER, OFFERED, [16], Budget(params=1, min_speedup=1.1), costs)


def test_reasons_tell_layers_that_must_be_alike_from_room_that_is_left() -> None:
    told = {False: "", True: ""}
    for alike in told:
        for share in (0.95, 0.9, 0.85, 0.8, 0.7):
            problem = replace(PROBLEM, homogeneous=alike, widths=None)
            told[alike] += explain(search(problem, Budget(params=int(TOTAL.params * share))), TEACHER).text()
    assert "does not fill the budget" in told[False] and "alike everywhere" not in told[False]
    assert "alike everywhere" in told[True] and "does not fill the budget" not in told[True]
    # what differs by rounding alone does not differ
    assert "as dear in all" in told[False] and not re.search(r"e-1\d (cheaper|dearer)", told[False] + told[True])
