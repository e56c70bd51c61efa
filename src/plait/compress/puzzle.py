"""Puzzle: from what each replacement harms and what each costs, the best model of different layers within a budget.

    minimise  harm(width) + sum over layers of harm(replacement)     within every limit of the budget together

Harms are of single replacements (single.py), as if those of several layers added up; costs are per layer and do add up.
The program is solved for each width of the model, and the best of these is taken. Widths of layers are free, or
(`homogeneous`) all layers of one kind are alike, as standard checkpoints need it.

Source   Bercovich et al. 2024, arXiv:2411.19146 section 4 (mixed-integer program).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from plait.compress.budget import LIMITS, Budget, BudgetError
from plait.compress.choice import Limit, Option
from plait.compress.costs import Costs, LayerCosts
from plait.compress.explain import nearest_text
from plait.compress.library import together
from plait.compress.plan import Plan
from plait.compress.replace import KEEP, Library, Replacement
from plait.compress.single import Harm, Table
from plait.compress.solve import Nearest, Solution, nearest, solve
from plait.model.config import ModelConfig

# the limit on how many layers may go
GONE = "layers gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """An answer: the plan, and all that it was chosen from.

    score: harm that is expected, base the part of it that the model's width has. chosen: a replacement per layer of the
    teacher. layers, limits: the program that `solution` solves. widths: d_model -> expected score, None where nothing
    fits.
    """

    plan: Plan
    score: float
    base: float
    chosen: tuple[Replacement, ...]
    solution: Solution
    layers: tuple[tuple[Option, ...], ...]
    limits: tuple[Limit, ...]
    widths: Mapping[int, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a search chooses from.

    replacements, table: of every layer, and the harm of each. weights: the folder that holds them. widths: d_model ->
    the harm of narrowing the model to it alone; the teacher's own has none and need not be named. by: which harm.
    homogeneous: all layers of one kind are to be alike.
    """

    teacher: ModelConfig
    replacements: Library
    table: Table
    weights: Path
    costs: Costs
    widths: Mapping[int, Harm] | None = None
    by: Literal["kl", "loss"] = "kl"
    homogeneous: bool = False


def search(problem: Problem, budget: Budget) -> Puzzle:
    """The best model within a budget.

    Args:
        problem: what to choose from.
        budget: speedups in it are against the teacher.

    Returns: the answer; of widths that score alike, the largest.
    Raises: BudgetError with the nearest budgets that can be kept, and what each would lose, if nothing fits; ValueError
        for a limit on times that no clock has told.
    """
    if budget != budget.sizes():
        budget = budget.against(problem.costs.total(problem.teacher))
    scores: dict[int, float | None] = {}
    best: tuple[float, int, Solution] | None = None
    for d_model, base in _widths(problem).items():
        layers, limits = program(problem, budget, d_model)
        solution = solve(layers, limits)
        scores[d_model] = None if solution is None else base + solution.score
        if solution is not None and (best is None or base + solution.score < best[0]):
            best = base + solution.score, d_model, solution
    if best is None:
        raise BudgetError(nearest_text(nearest_budgets(problem, budget), budget.ceilings()))
    score, d_model, solution = best
    layers, limits = program(problem, budget, d_model)
    named = [{r.name: r for r in row} for row in problem.replacements]
    chosen = tuple(row[option.name] for row, option in zip(named, solution.chosen, strict=True))
    return Puzzle(
        plan=_plan(problem, chosen, d_model),
        score=score,
        base=score - solution.score,
        chosen=chosen,
        solution=solution,
        layers=tuple(tuple(row) for row in layers),
        limits=tuple(limits),
        widths=scores,
    )


def require(teacher: ModelConfig, replacements: Library, widths: Sequence[int], budget: Budget, costs: Costs) -> None:
    """Refuse a budget that no choice keeps, before any replacement has been made; sizes first, as they need no clock.

    Args:
        teacher, replacements, costs: as of a Problem.
        widths: of the model that are offered besides the teacher's.
        budget: speedups in it are against the teacher.

    Raises: BudgetError with the nearest budgets that can be kept.
    """
    none = Harm(kl=0.0, loss=0.0)
    problem = Problem(
        teacher=teacher,
        replacements=replacements,
        table={(r.layer, r.name): none for row in replacements for r in row},
        weights=Path(),
        costs=costs,
        widths=dict.fromkeys(widths, none),
    )

    def timed() -> Budget:
        found = budget.against(costs.total(teacher))
        for d_model in _widths(problem):
            program(problem, found, d_model)
        return found

    for part in dict.fromkeys((budget.sizes(), budget)):
        part = part if part == part.sizes() else together(costs, timed)
        if all(solve(*program(problem, part, d_model)) is None for d_model in _widths(problem)):
            raise BudgetError(nearest_text(nearest_budgets(problem, part), part.ceilings(), is_scored=False))


def nearest_budgets(problem: Problem, budget: Budget) -> tuple[Nearest, ...]:
    """The least that a budget must be raised by, each limit alone and all together, over all widths of the model.

    Args: budget: that nothing is within, with speedups turned into times.
    """
    found: dict[tuple[str, ...], tuple[float, Nearest]] = {}
    ceilings = budget.ceilings()
    for d_model, base in _widths(problem).items():
        for near in nearest(*program(problem, budget, d_model)):
            key = tuple(near.raised)
            share = max(near.raised[name] / ceilings[name] for name in key)
            near = replace(near, solution=replace(near.solution, score=base + near.solution.score))
            if key not in found or share < found[key][0]:
                found[key] = share, near
    return tuple(near for _, near in found.values())


def program(problem: Problem, budget: Budget, d_model: int) -> tuple[list[list[Option]], list[Limit]]:
    """The options of every layer in a model of this width, and the limits."""
    ceilings, config = budget.ceilings(), replace(problem.teacher, d_model=d_model)
    # a clock may have to measure: nobody asks it whom time does not limit
    costs = problem.costs if budget != budget.sizes() else replace(problem.costs, clock=None)
    rest = costs.rest(config)
    limits = [
        Limit(name=name, ceiling=_whole(ceiling), fixed=_cost(rest, name), unit=LIMITS[name])
        for name, ceiling in ceilings.items()
    ]
    # a model has a layer, whatever the budget says
    limits.append(Limit(name=GONE, ceiling=len(problem.replacements) - 1, hard=True))
    known: dict[object, LayerCosts] = {None: LayerCosts()}
    layers = []
    for row in problem.replacements:
        options = []
        for r in row:
            if r.spec not in known:
                known[r.spec] = costs.layer(r.spec, d_model)  # type: ignore[arg-type]
            options.append(
                Option(
                    name=r.name,
                    score=getattr(problem.table[r.layer, r.name], problem.by),
                    uses={name: _cost(known[r.spec], name) for name in ceilings} | {GONE: int(r.spec is None)},
                    changed=r.name != KEEP,
                    agrees=(r.spec.symbol, repr(r.spec)) if problem.homogeneous and r.spec is not None else None,
                )
            )
        layers.append(options)
    return layers, limits


def _widths(problem: Problem) -> dict[int, float]:
    """Harm by width of the model, the widest first."""
    own = {problem.teacher.d_model: 0.0}
    found = {d: getattr(harm, problem.by) for d, harm in (problem.widths or {}).items()} | own
    return dict(sorted(found.items(), reverse=True))


def _plan(problem: Problem, chosen: tuple[Replacement, ...], d_model: int) -> Plan:
    stay = [r for r in chosen if r.spec is not None]
    layers = tuple(r.spec for r in stay if r.spec is not None)
    return Plan(
        kept=tuple(r.layer for r in stay),
        config=replace(problem.teacher, layers=layers, d_model=d_model),
        replaced={r.layer: r.file(problem.weights) for r in stay if r.learns},
    )


def _cost(costs: LayerCosts, limit: str) -> float:
    """What counts for a limit.

    Raises: ValueError for a time that no clock has told.
    """
    value = getattr(costs, limit)
    if value != value:
        raise ValueError(f"{limit} needs a clock: name a machine, or measure on this one")
    return _whole(value)


def _whole(value: float) -> float:
    """A whole number as int, which is compared exactly."""
    return int(value) if float(value).is_integer() else float(value)
