"""What quality each size or speed can have: one scoring, solved again for a sweep of budgets.

A point is the best model under one ceiling; together they are the front of quality against memory, or against time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from plait.compress.budget import LIMITS, Budget, BudgetError
from plait.compress.costs import Costs, LayerCosts
from plait.compress.plan import Plan
from plait.compress.puzzle import Problem, search
from plait.model.config import ModelConfig

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# points done, and in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """share: of the teacher's, which is the ceiling. score: expected harm; None, like plan and costs, if nothing fits.

    price: of the limit, in score per unit.
    """

    limit: str
    share: float
    ceiling: float
    score: float | None = None
    price: float | None = None
    plan: Plan | None = None
    costs: LayerCosts | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, the model as its pattern."""
        facts = {"limit": self.limit, "share": self.share, "ceiling": self.ceiling, "score": self.score}
        costs = None if self.costs is None else {name: _number(getattr(self.costs, name)) for name in LIMITS}
        pattern = None if self.plan is None else self.plan.config.pattern
        return facts | {"price": self.price, "costs": costs, "pattern": pattern}


def front(
    problem: Problem,
    limit: str,
    *,
    shares: Sequence[float] = SHARES,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> tuple[Point, ...]:
    """The best models under falling ceilings of one limit.

    Args:
        problem: scored once.
        limit: a field of Budget: "total_bytes", "decode_s", ...
        shares: of what the teacher has of it.
        budget: what else must be kept; None for nothing.
        progress: called after every point.

    Returns: a point per share, in their order.
    Raises: ValueError for an unknown limit.
    """
    if limit not in LIMITS:
        raise ValueError(f"limit={limit!r} is unknown; known: {', '.join(LIMITS)}")
    whole = getattr(problem.costs.total(problem.teacher), limit)
    points = []
    for i, share in enumerate(shares):
        ceiling = whole * share if limit != "params" else int(whole * share)
        point = Point(limit=limit, share=share, ceiling=ceiling)
        try:
            found = search(problem, replace(budget or Budget(), **{limit: ceiling}))
        except BudgetError:
            # an empty place in the front is an answer
            points.append(point)
        else:
            price, costs = found.solution.prices[limit], problem.costs.total(found.plan.config)
            points.append(replace(point, score=found.score, price=price, plan=found.plan, costs=costs))
        if progress is not None:
            progress(i + 1, len(shares))
    return tuple(points)


def place(config: ModelConfig, costs: Costs) -> dict[str, object]:
    """Where a model stands beside a front: its costs by limit, JSON-ready, None without a clock."""
    total = costs.total(config)
    return {name: _number(getattr(total, name)) for name in LIMITS}


def _number(value: float) -> float | None:
    return None if value != value else value
