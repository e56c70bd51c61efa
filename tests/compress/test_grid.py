"""The grid holds every combination, counts why cells do not fit, and finds those that do without running a model."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from tests.compress.teachers import config

from plait.compress.axes.depth import keep_layers
from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs, LayerCosts, Load
from plait.compress.grid import Space, fit, space_around
from plait.compress.numbers import Numbers
from plait.compress.plan import shrunk
from plait.compress.roofline import Roofline
from plait.model.config import ModelConfig
from plait.model.plan import MACHINES

TEACHER = config("M-M*-M-")
IMPORTANCE = (5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0)
COSTS = Costs(load=Load(context=64), clock=Roofline(machine=MACHINES["h100"]))
SPACE = Space(
    counts={"M": (3, 2), "-": (3, 2, 1)},
    sizes={"M": {"n_heads": (6, 4)}, "*": {"n_kv_heads": (3, 2, 1)}, "-": {"d_ff": (24, 16, 9)}},
    d_model=(20, 16),
)


def by_hand(budget: Budget) -> tuple[dict[tuple[int, ...], object], Counter[str]]:
    """Every cell by the slow way."""
    fits, reasons = {}, Counter()
    for m, f, heads, kv, d_ff, d in itertools.product((3, 2), (3, 2, 1), (6, 4), (3, 2, 1), (24, 16, 9), (20, 16)):
        kept = keep_layers(IMPORTANCE, TEACHER, {"M": m, "-": f})
        sizes = {"M": {"n_heads": heads}, "*": {"n_kv_heads": kv, "n_heads": 2 * kv}, "-": {"d_ff": d_ff}}
        plan = shrunk(TEACHER, kept, d_model=d, sizes=sizes)
        verdict = budget.verdict(plan.config, COSTS)
        if verdict.ok:
            fits[m, f, heads, kv, d_ff, d] = plan
        else:
            reasons[verdict.limit] += 1
    return fits, reasons


@pytest.fixture
def budget() -> Budget:
    total = COSTS.total(TEACHER)
    return Budget(params=int(total.params * 0.85), total_bytes=total.total_bytes * 0.8, min_speedup=1.1).against(total)


def test_what_fits_and_why_not_is_what_looking_at_every_cell_tells(budget: Budget) -> None:
    found, (fits, reasons) = fit(TEACHER, SPACE, IMPORTANCE, budget, COSTS, maximal=False), by_hand(budget)
    assert found.cells == SPACE.n_cells == 216 and 0 < len(fits) < 216
    assert len(found.plans) == len(fits) and all(plan in found.plans for plan in fits.values())
    assert found.reasons == reasons and found.smaller == 0


def test_only_cells_without_a_larger_one_are_kept(budget: Budget) -> None:
    found, (fits, _) = fit(TEACHER, SPACE, IMPORTANCE, budget, COSTS), by_hand(budget)
    largest = [
        plan
        for cell, plan in fits.items()
        if not any(other != cell and all(a >= b for a, b in zip(other, cell, strict=True)) for other in fits)
    ]
    assert len(found.plans) == len(largest) and all(plan in found.plans for plan in largest)
    assert found.smaller == len(fits) - len(largest)


def test_a_budget_that_nothing_fits_names_its_limits_and_the_nearest() -> None:
    found = fit(TEACHER, SPACE, IMPORTANCE, Budget(params=100), COSTS)
    assert not found.plans and found.reasons == {"params": 216}
    smallest = min(plan.config.cost().params for plan in by_hand(Budget(params=10**9))[0].values())
    (near,) = found.nearest
    assert near.raised == {"params": (100, smallest)} and near.costs.params == smallest
    with pytest.raises(BudgetError, match=r"(?s)params in 216.*nearest that is possible:.params"):
        found.require()


def test_the_nearest_budgets_can_be_kept_and_none_nearer_can() -> None:
    totals = _totals()
    lightest, fastest = (min(totals, key=lambda total: getattr(total, name)) for name in ("total_bytes", "decode_s"))
    middle = sorted(total.decode_s for total in totals)[len(totals) // 2]
    for memory, time in ((lightest.total_bytes - 1, middle), (lightest.total_bytes, fastest.decode_s * 0.9)):
        budget = Budget(total_bytes=memory, decode_s=time)
        found = fit(TEACHER, SPACE, IMPORTANCE, budget, COSTS)
        assert not found.plans and len(found.nearest) > 0
        for near in found.nearest:
            asked = budget if near.is_timed else budget.sizes()
            ceilings = {**asked.ceilings(), **{name: at for name, (_, at) in near.raised.items()}}

            def kept(total: object, by: float = 1.0, ceilings: dict[str, float] = ceilings) -> bool:
                return all(getattr(total, name) <= at * by * (1 + 1e-12) for name, at in ceilings.items())

            lower = ceilings | {name: at * (1 - 1e-6) for name, (_, at) in near.raised.items()}
            assert kept(near.costs) and any(kept(total) for total in totals)
            assert not any(kept(total, 1.0, lower) for total in totals)
        names = [tuple(near.raised) for near in found.nearest]
        if memory < lightest.total_bytes:
            assert names == [("total_bytes",)] and not found.nearest[0].is_timed
        else:
            assert names == [("decode_s",), ("total_bytes", "decode_s")] and found.nearest[0].is_timed


def _totals() -> list[LayerCosts]:
    free = Budget(params=10**9)
    return [COSTS.total(plan.config) for plan in by_hand(free)[0].values()]


def test_a_clock_is_asked_only_how_fast_small_enough_models_are() -> None:
    asked: list[int] = []

    class Watch(Roofline):
        def rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> tuple[float, float]:
            asked.append(config.d_model)
            return super().rest(config, load, numbers)

    costs = replace(COSTS, clock=Watch(machine=MACHINES["h100"]))
    assert fit(TEACHER, SPACE, IMPORTANCE, Budget(params=10**9), costs).plans and not asked
    found = fit(TEACHER, SPACE, IMPORTANCE, Budget(params=100, decode_s=1.0), costs)
    assert not asked and not found.nearest[0].is_timed and "speed not looked at" in str(found.nearest[0])
    assert fit(TEACHER, SPACE, IMPORTANCE, Budget(params=10**9, decode_s=1.0), costs).plans and asked


def test_a_space_around_a_teacher_holds_the_teacher_and_sizes_that_models_can_have() -> None:
    space = space_around(TEACHER, steps=3)
    assert all(values[0] == own for values, own in ((space.counts["M"], 3), (space.d_model, 20)))
    found = fit(TEACHER, space, IMPORTANCE, Budget(params=10**9), COSTS, maximal=False)
    assert found.plans[0].config == TEACHER and len(found.plans) == found.cells and not found.reasons


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"counts": {"E": (1,)}}, "the teacher M-M\\*-M- has none"),
        ({"sizes": {"M": {"d_ff": (4,)}}}, "'d_ff' is no size"),
    ],
)
def test_what_the_teacher_does_not_have_is_named(space: dict[str, dict], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(TEACHER, Space(**space), IMPORTANCE, Budget(params=10), COSTS)


def test_values_must_fall() -> None:
    with pytest.raises(ValueError, match="descending"):
        Space(d_model=(16, 20))
