"""What a search is worth is seen beside models made without one: fitted to the same budget, by simple rules.

    depth      layers go, the least important first, until the rest fits; widths stay
    width      all layers stay; every width shrinks by the same share
    magnitude  layers and widths shrink by the same share; the smallest weights go
    random     layers and widths are drawn, and so are the units that stay

Each shrinks no more than it must: one step less and it would not fit.
"""

import random as randomness
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plait.compress.axes.depth import keep_layers
from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs
from plait.compress.grid import axes_of, sizes_within
from plait.compress.magnitude import chances, magnitudes
from plait.compress.plan import Plan, shrunk
from plait.compress.score import Scores
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig

# of a share: finer steps than widths have
STEPS = 64
# draws after which a random model that fits is given up
TRIES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """name: see above. scores: what to cut it by; None for the teacher's own.

    as_published: cut without merging twins or rescaling norms, which would use what a look at text has told.
    """

    name: str
    plan: Plan
    scores: Scores | None = None
    as_published: bool = False


def depth(teacher: ModelConfig, scores: Scores, budget: Budget, costs: Costs, *, by: str = "mse") -> Baseline:
    """The fewest least important layers gone, of whatever kind.

    Args:
        by: the measure of `scores.layers`; where layers were removed one after the other, that order comes first.

    Raises: BudgetError if not even one layer fits.
    """
    rest = [i for i in range(len(teacher.layers)) if i not in scores.order]
    order = [*scores.order, *sorted(rest, key=lambda i: (scores.layers[by][i], i))]

    def plan(gone: int) -> Plan:
        return shrunk(teacher, tuple(sorted(order[gone:])))

    return Baseline(name="depth", plan=_first_fit("depth", plan, range(len(order)), budget, costs))


def width(teacher: ModelConfig, budget: Budget, costs: Costs) -> Baseline:
    """All widths smaller by the same share, the model's own too.

    Raises: BudgetError if not even the smallest fits.
    """

    def plan(step: int) -> Plan:
        return _scaled(teacher, tuple(range(len(teacher.layers))), 1 - step / STEPS)

    return Baseline(name="width", plan=_first_fit("width", plan, range(STEPS), budget, costs))


def magnitude(checkpoint: Checkpoint, scores: Scores, budget: Budget, costs: Costs) -> Baseline:
    """Layers and widths smaller by the same share, the smallest weights gone.

    Args: scores: of the checkpoint, for the shapes of its units.
    Raises: BudgetError if not even the smallest fits.
    """
    teacher, found = checkpoint.config, magnitudes(checkpoint.tensors, checkpoint.config, scores)

    def plan(step: int) -> Plan:
        share = 1 - step / STEPS
        counts = {s: max(1, round(teacher.pattern.count(s) * share)) for s in dict.fromkeys(teacher.pattern)}
        return _scaled(teacher, keep_layers(found.layers["magnitude"], teacher, counts), share)

    fitted = _first_fit("magnitude", plan, range(STEPS), budget, costs)
    return Baseline(name="magnitude", plan=fitted, scores=found, as_published=True)


def random(teacher: ModelConfig, scores: Scores, budget: Budget, costs: Costs, *, seed: int) -> Baseline:
    """Layers, widths and units drawn by chance, of models that fit but would not with a step more width.

    Args: scores: for the shapes of the units. seed: of every draw.
    Raises: BudgetError if no model that was drawn fits.
    """
    rng, found = randomness.Random(seed), chances(scores, seed)
    kinds = list(dict.fromkeys(teacher.pattern))
    for _ in range(TRIES):
        counts = {s: rng.randint(max(1, teacher.pattern.count(s) // 2), teacher.pattern.count(s)) for s in kinds}
        kept = keep_layers(found.layers["random"], teacher, counts)
        shares = {symbol: rng.uniform(0.5, 1.0) for symbol in [*kinds, "d_model"]}

        def plan(step: int, kept: tuple[int, ...] = kept, shares: dict[str, float] = shares) -> Plan:
            return _scaled(teacher, kept, {s: min(1.0, share * (2 - 2 * step / STEPS)) for s, share in shares.items()})

        try:
            fitted = _first_fit("random", plan, range(STEPS), budget, costs)
        except BudgetError:
            continue
        return Baseline(name="random", plan=fitted, scores=found, as_published=True)
    raise BudgetError(f"none of {TRIES} random models is within the budget; seed={seed}")


def _first_fit(name: str, plan: Callable[[int], Plan], steps: Sequence[int], budget: Budget, costs: Costs) -> Plan:
    """The first of ever smaller plans that fits, by bisection; costs fall from step to step."""
    low, high = 0, len(steps) - 1
    verdict = budget.verdict(plan(steps[high]).config, costs)
    if not verdict.ok:
        raise BudgetError(f"baseline {name}: even its smallest model is not within the budget: {verdict}")
    while low < high:
        middle = (low + high) // 2
        if budget.verdict(plan(steps[middle]).config, costs).ok:
            high = middle
        else:
            low = middle + 1
    return plan(steps[high])


def _scaled(teacher: ModelConfig, kept: tuple[int, ...], share: float | dict[str, float]) -> Plan:
    """The plan of these layers with all widths times a share, or one by letter and "d_model"."""

    def of(name: str) -> float:
        return share if isinstance(share, float | int) else share[name]

    sizes: dict[str | int, dict[str, int]] = {}
    for i in kept:
        spec = teacher.layers[i]
        wanted = {name: _multiple(getattr(spec, name), of(spec.symbol), unit) for name, unit in axes_of(spec).items()}
        sizes[i] = sizes_within(spec, wanted)
    unit = 8 if teacher.d_model % 8 == 0 else 1
    return shrunk(teacher, kept, d_model=_multiple(teacher.d_model, of("d_model"), unit), sizes=sizes)


def _multiple(own: int, share: float, unit: int) -> int:
    return min(own, max(unit, round(own * share / unit) * unit))
