"""MiniPuzzle's grid: every combination of layer counts and widths, those that fit the budget, and the best of these.

    cells = product over kinds of layer counts x product over axes of widths
    fit   = cells within the budget, of which (if asked) only those where one step more on any axis no longer fits

A cell keeps its most important layers of each kind, and later its most important units; all layers of a kind get the
same width. How many cells there are, which fit and why others do not is known before a model is run.

Source   NVIDIA 2025, arXiv:2504.03624 section 3.2 (MiniPuzzle), NVIDIA 2025, arXiv:2508.14444 section 4.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import prod

from plait.compress.axes.depth import keep_layers
from plait.compress.budget import LIMITS, Budget, BudgetError
from plait.compress.costs import Costs, LayerCosts
from plait.compress.explain import enough
from plait.compress.plan import Plan, shrunk
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.moe import MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The axes of a grid, each with its values in descending order.

    counts: pattern letter -> how many layers of that kind may stay. sizes: pattern letter -> field of its spec ->
    values, for all layers of the kind (a layer that is smaller already stays as it is). "n_kv_heads" alone takes whole
    groups of attention heads away. d_model: widths of the model.
    """

    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    d_model: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.axes().items():
            if not values or list(values) != sorted(set(values), reverse=True):
                raise ValueError(f"{' '.join(name)}={values}: give values in descending order, each once")

    def axes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Values by axis: ("layers", letter), (letter, field), ("d_model",)."""
        found: dict[tuple[str, ...], tuple[int, ...]] = {("layers", s): n for s, n in self.counts.items()}
        found |= {(s, name): values for s, named in self.sizes.items() for name, values in named.items()}
        return found | ({("d_model",): self.d_model} if self.d_model else {})

    @property
    def n_cells(self) -> int:
        """How many combinations there are."""
        return prod(len(values) for values in self.axes().values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """plans: that fit, largest values first. cells: looked at. reasons: limit -> cells whose first broken limit it is.

    smaller: cells that fit, but so does one with more on some axis and less on none. nearest: if none fits, the budgets
    that a cell keeps: each limit raised alone, if the others can be kept, then all raised by one share.
    """

    plans: tuple[Plan, ...]
    cells: int
    reasons: Mapping[str, int]
    smaller: int
    nearest: tuple["Near", ...] = ()

    def require(self) -> None:
        """Refuse a budget that nothing fits.

        Raises: BudgetError naming the limits in the way and the nearest that the grid comes to.
        """
        if not self.plans:
            counted = ", ".join(f"{limit} in {n:,}" for limit, n in self.reasons.items())
            near = "; or\n".join(map(str, self.nearest)) or "none"
            raise BudgetError(
                f"none of the {self.cells:,} candidates fits: {counted}. The nearest that is possible:\n{near}.\n"
                "Raise limits so far, or allow fewer layers and smaller widths (space.depth, space.width)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """A budget that one cell keeps. raised: limit -> (ceiling as asked, ceiling that is needed). costs: of the cell.

    is_timed: whether limits on time were looked at; they are not where no cell keeps the others.
    """

    raised: Mapping[str, tuple[float, float]]
    costs: LayerCosts
    params: float
    is_timed: bool = True

    def __str__(self) -> str:
        raised = " and ".join(
            f"{name} {enough(at, LIMITS[name])} (+{at / asked - 1:.1%})" for name, (asked, at) in self.raised.items()
        )
        left = f", with {self.costs.params / self.params:.0%} of the teacher's parameters"
        return raised + left + ("" if self.is_timed else ", its speed not looked at")


def space_around(teacher: ModelConfig, *, depth: float = 0.3, width: float = 0.5, steps: int = 4) -> Space:
    """A grid around a teacher: as many layers and widths as it has, and less in equal steps.

    Args:
        teacher: its kinds and their largest sizes.
        depth: the largest share of the layers of a kind that may go.
        width: the largest share of an axis that may go.
        steps: values below the teacher's own, at most, on each axis; widths are rounded to what its kind allows.
    """
    sizes: dict[str, dict[str, tuple[int, ...]]] = {}
    for symbol in dict.fromkeys(teacher.pattern):
        specs = [spec for spec in teacher.layers if spec.symbol == symbol]
        named = sizes.setdefault(symbol, {})
        for name, unit in axes_of(specs[0]).items():
            named[name] = _values(max(getattr(spec, name) for spec in specs), width, steps, unit)
    counts = {symbol: _values(teacher.pattern.count(symbol), depth, steps, 1) for symbol in sizes}
    unit = 8 if teacher.d_model % 8 == 0 else 1
    return Space(counts=counts, sizes=sizes, d_model=_values(teacher.d_model, width / 2, steps, unit))


def fit(
    teacher: ModelConfig,
    space: Space,
    importance: Sequence[float],
    budget: Budget,
    costs: Costs,
    *,
    maximal: bool = True,
) -> Fit:
    """Which cells of a grid fit a budget. No model is run.

    Args:
        teacher: what candidates are cut from.
        space: the grid.
        importance: one number per layer; larger stays.
        budget: with speedups turned into times (`budget.against`).
        costs: what models cost.
        maximal: leave out cells where one step more on some axis fits too.

    Raises: ValueError for a kind or a size that the teacher does not have; see `Fit.require` for when nothing fits.
    """
    _check(space, teacher)
    # clocks are slow where they measure: what is too large is never asked how fast it is
    sizes, is_timed = budget.sizes(), budget.sizes() != budget
    sized, timed = (_Cells(teacher, importance, by) for by in (replace(costs, clock=None), costs))
    axes = space.axes()
    small: set[tuple[int, ...]] = set()
    found: set[tuple[int, ...]] = set()
    reasons: Counter[str] = Counter()
    for place in _places(axes):
        total = sized.total(_cell(axes, place))
        if total is None:
            reasons["no such model"] += 1
            continue
        verdict = sizes.judge(total)
        if verdict.ok:
            small.add(place)
            if is_timed:
                total = timed.total(_cell(axes, place))
                assert total is not None, "what has bytes has times"
                verdict = budget.judge(total)
        if verdict.ok:
            found.add(place)
        else:
            reasons[str(verdict.limit)] += 1
    largest = sorted(place for place in found if not (maximal and any(more in found for more in _one_more(place))))
    cells, limits = (timed, budget) if is_timed and small else (sized, sizes)
    return Fit(
        plans=tuple(sized.plan(_cell(axes, place)) for place in largest),
        cells=space.n_cells,
        reasons=dict(reasons),
        smaller=len(found) - len(largest),
        nearest=() if found else _nearest(cells, axes, limits.ceilings(), is_timed=limits == budget),
    )


def _places(axes: Mapping[tuple[str, ...], tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(values)) for values in axes.values()))


def _nearest(
    cells: "_Cells",
    axes: Mapping[tuple[str, ...], tuple[int, ...]],
    ceilings: Mapping[str, float],
    *,
    is_timed: bool,
) -> tuple[Near, ...]:
    """Of every way of raising limits, the least that a cell needs."""
    ways = [(name,) for name in ceilings] + ([tuple(ceilings)] if len(ceilings) > 1 else [])
    least: dict[tuple[str, ...], tuple[float, LayerCosts]] = {}
    for place in _places(axes):
        total = cells.total(_cell(axes, place))
        if total is None:
            continue
        over = {name: getattr(total, name) / ceiling for name, ceiling in ceilings.items()}
        for way in ways:
            share = max(over[name] for name in way)
            if all(over[name] <= 1 for name in over if name not in way) and share < least.get(way, (math.inf,))[0]:
                least[way] = share, total
    found = []
    for way in ways:
        if way in least:
            share, total = least[way]
            # all together: each by the same share, a single one to what is needed
            raised = {name: (ceilings[name], ceilings[name] * share) for name in way}
            params = cells.teacher.cost().params
            found.append(Near(raised=raised, costs=total, params=params, is_timed=is_timed))
    return tuple(found)


# an axis -> its value
Cell = Mapping[tuple[str, ...], int]
Wanted = tuple[tuple[str, int], ...]


def _cell(axes: Mapping[tuple[str, ...], tuple[int, ...]], place: Sequence[int]) -> Cell:
    return {name: values[i] for (name, values), i in zip(axes.items(), place, strict=True)}


class _Cells:
    """What cells cost, each distinct layer looked at once: a grid has many models of few layers."""

    def __init__(self, teacher: ModelConfig, importance: Sequence[float], costs: Costs) -> None:
        self.teacher, self.costs = teacher, costs
        self.kept = cache(lambda counts: keep_layers(importance, teacher, dict(counts)))
        self.specs = cache(lambda counts: Counter(teacher.layers[i] for i in self.kept(counts)))
        self.cost = cache(self._cost)
        self.rest = cache(lambda d_model: costs.rest(replace(teacher, d_model=d_model)))

    def total(self, cell: Cell) -> LayerCosts | None:
        """`costs.total` of a cell; None where its sizes make no model."""
        d_model = cell.get(("d_model",), self.teacher.d_model)
        parts = [(1, self.rest(d_model))]
        for spec, n in self.specs(_counts(cell)).items():
            cost = self.cost(spec, _wanted(cell, spec.symbol), d_model)
            if cost is None:
                return None
            parts.append((n, cost))
        if len(parts) == 1:
            return None
        return LayerCosts(**{f.name: sum(n * getattr(part, f.name) for n, part in parts) for f in fields(LayerCosts)})

    def plan(self, cell: Cell) -> Plan:
        """The plan of a cell."""
        kept = self.kept(_counts(cell))
        layers = self.teacher.layers
        sizes: dict[str | int, dict[str, int]] = {
            i: sizes_within(layers[i], dict(_wanted(cell, layers[i].symbol))) for i in kept
        }
        return shrunk(self.teacher, kept, d_model=cell.get(("d_model",)), sizes=sizes)

    def _cost(self, spec: LayerSpec, wanted: Wanted, d_model: int) -> LayerCosts | None:
        alone = replace(self.teacher, layers=(spec,))
        try:
            smaller = shrunk(alone, sizes={0: sizes_within(spec, dict(wanted))}).config.layers[0]
        except ValueError:
            # such as heads that do not divide by a number of groups: the grid is a product, models are not
            return None
        return self.costs.layer(smaller, d_model)


def _counts(cell: Cell) -> Wanted:
    return tuple((name[1], n) for name, n in cell.items() if name[0] == "layers")


def _wanted(cell: Cell, symbol: str) -> Wanted:
    return tuple((name[1], n) for name, n in cell.items() if name[0] == symbol)


def _check(space: Space, teacher: ModelConfig) -> None:
    for symbol in {*space.counts, *space.sizes}:
        if symbol not in teacher.pattern:
            raise ValueError(f"layers {symbol!r}: the teacher {teacher.pattern} has none; leave them out of the grid")
    for symbol, named in space.sizes.items():
        spec = next(spec for spec in teacher.layers if spec.symbol == symbol)
        known = [f.name for f in fields(spec)]
        for name in named:
            if name not in known:
                raise ValueError(f"{symbol}: {name!r} is no size of such layers; they have {', '.join(known)}")


def sizes_within(spec: LayerSpec, wanted: Mapping[str, int]) -> dict[str, int]:
    """The wanted sizes, no larger than a layer's own, and what must follow.

    Fewer key/value heads alone take their query heads along; a token chooses no more experts than there are.
    """
    sizes = {name: min(value, getattr(spec, name)) for name, value in wanted.items()}
    if isinstance(spec, Attention) and "n_kv_heads" in sizes and "n_heads" not in sizes:
        sizes["n_heads"] = spec.n_heads // spec.n_kv_heads * sizes["n_kv_heads"]
    if isinstance(spec, MoE) and "n_experts" in sizes and "n_chosen" not in sizes:
        sizes["n_chosen"] = min(spec.n_chosen, sizes["n_experts"] // spec.n_groups * spec.n_top_groups)
    return sizes


def _one_more(place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The cells with one step more on one axis."""
    return (place[:i] + (at - 1,) + place[i + 1 :] for i, at in enumerate(place) if at)


def axes_of(spec: LayerSpec) -> dict[str, int]:
    """Fields of a kind that a grid changes, and what their values are multiples of."""
    if isinstance(spec, Mamba2):
        return {"n_heads": spec.n_groups}
    if isinstance(spec, Attention):
        return {"n_kv_heads": 1}
    if isinstance(spec, MoE):
        return {"n_experts": spec.n_groups}
    value = spec.d_ff  # type: ignore[attr-defined]
    return {"d_ff": next((unit for unit in (64, 32, 16, 8) if value % unit == 0 and value >= 8 * unit), 1)}


def _values(most: int, share: float, steps: int, unit: int) -> tuple[int, ...]:
    """`most` and at most `steps` smaller multiples of the unit, down to a share less."""
    least = most * (1 - share)
    wanted = (most - (most - least) * k / steps for k in range(steps + 1))
    rounded = (max(unit, round(value / unit) * unit) for value in wanted)
    return (most, *sorted({value for value in rounded if value < most}, reverse=True))
