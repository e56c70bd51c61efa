"""The grid holds every combination, counts why cells do not fit, and finds those that do without running a model."""

import itertools
from collections import Counter

import pytest
from tests.compress.teachers import config

from plait.compress.axes.depth import keep_layers
from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs, Load
from plait.compress.grid import Space, fit, space_around
from plait.compress.plan import shrunk
from plait.compress.roofline import Roofline
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
    with pytest.raises(BudgetError, match=r"params in 216.*nearest: params"):
        found.require()


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
