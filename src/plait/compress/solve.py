"""Choose one option for every layer so that little is lost and every limit is kept: exactly, and the same everywhere.

    minimise  sum of the chosen options' scores     such that every limit is kept (the program is in choice.py)

Ties    the lowest score wins; scores that differ by less than 2^-20 of what the best answer loses are equal. Of equals,
        the one with the fewest changed layers; of those, the one whose first layers take the earlier options, where
        the unchanged option comes first, then the cheaper one (limits in the order of their names), then the name. So
        the order in which options or limits are given is of no matter.
Prices  of a limit: what the score would fall by if its ceiling rose by one, were fractions of options allowed (the dual
        of the relaxed program); 0 for a limit that does not bind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plait.compress.choice import Layers, Limit, Model, Option, used
from plait.compress.program import Row

# of the score that the best answer loses: what is smaller is no difference
STEPS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """chosen: one option per layer. score: their sum. used: of each limit, its fixed part included. prices: above."""

    chosen: tuple[Option, ...]
    score: float
    used: Mapping[str, float]
    prices: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """A budget that can be kept, near one that cannot: the ceilings that were raised, and the best answer there."""

    raised: Mapping[str, float]
    solution: Solution


def solve(layers: Layers, limits: Sequence[Limit]) -> Solution | None:
    """The best choice under all limits; None if there is none, and then `nearest` tells what can be had.

    Args:
        layers: the options of each layer, in any order.
        limits: in any order; none at all is allowed.

    Raises: ValueError for a layer without options, a name twice, or a number that is not finite; or if the solver is
        not installed.
    """
    ordered, limits = _checked(layers, limits)
    model = Model(ordered, limits)
    scores = [[option.score for option in options] for options in ordered]
    spread = max(max(row) - min(row) for row in scores) or 1.0
    least = [min(row) for row in scores]
    first = model.best(model.costs([[(s - low) / spread for s in row] for row, low in zip(scores, least, strict=True)]))
    if first is None:
        return None
    prices = model.prices(scores, spread)
    best = _settled(ordered, limits, scores, first)
    chosen = tuple(options[j] for options, j in zip(ordered, best, strict=True))
    return Solution(
        chosen=chosen,
        score=math.fsum(option.score for option in chosen),
        used={limit.name: used(limit, chosen) for limit in limits},
        prices=prices,
    )


def nearest(layers: Layers, limits: Sequence[Limit]) -> tuple[Nearest, ...]:
    """The least that must be given up where `solve` finds nothing; hard limits are kept.

    Returns: first, every limit raised alone, as little as suffices, if the others can be kept; then, for more than one
        limit, all raised by the same share. Each with the best answer under it.
    Raises: as `solve`; ValueError for a ceiling of 0 or less, which no share of it raises.
    """
    ordered, limits = _checked(layers, limits)
    found, soft = [], [limit for limit in limits if not limit.hard]
    for limit in soft:
        others = [other for other in limits if other is not limit]
        model = Model(ordered, others)
        least = model.best(model.costs(_scaled(ordered, limit)))
        if least is not None:
            needed = used(limit, [options[j] for options, j in zip(ordered, least, strict=True)])
            found.append(_raised(ordered, limits, {limit.name: max(needed, limit.ceiling)}))
    if len(soft) > 1:
        share = _least_share(ordered, limits)
        ceilings = {limit.name: _ceiled(limit, share) for limit in soft}
        found.append(_raised(ordered, limits, ceilings))
    return tuple(found)


def _settled(layers: Layers, limits: Sequence[Limit], scores: Sequence[Sequence[float]], first: list[int]) -> list[int]:
    """Of all choices as good as `first`, the one that the rule of ties names."""
    over = [[score - min(row) for score in row] for row in scores]
    lost = math.fsum(row[j] for row, j in zip(over, first, strict=True))
    # a power of two, so that the grid does not hang on how the sum was rounded
    step = 2.0 ** math.floor(math.log2(lost / STEPS)) if lost / STEPS > 0 else 0.0
    kept = [
        _undominated(options, [round(x / step) if step else int(x > 0) for x in row], lost, row)
        for options, row in zip(layers, over, strict=True)
    ]
    ranks = [[j for j, _ in row] for row in kept]
    units = [[unit for _, unit in row] for row in kept]
    model = Model([[options[j] for j in row] for options, row in zip(layers, ranks, strict=True)], limits)
    picks = _least(model, units, [])
    assert picks is not None, "what was found before is still there"
    rows = [_at_most(model, units, picks)]
    changes = [[int(option.changed) for option in options] for options in model.layers]
    if sum(row[j] for row, j in zip(changes, picks, strict=True)):
        picks = _least(model, changes, rows) or picks
    rows.append(_at_most(model, changes, picks))
    picks = _first(model, picks, rows)
    return [row[j] for row, j in zip(ranks, picks, strict=True)]


def _first(model: Model, picks: list[int], rows: list[Row]) -> list[int]:
    """The choice under `rows` whose options come first, layer by layer; `picks` is one of them."""
    chosen = {row[j]: 1.0 for row, j in zip(model.columns, picks, strict=True)}
    if model.best({}, [*rows, Row(weights=chosen, high=len(picks) - 0.5)]) is None:
        return picks
    rows, start = list(rows), 0
    while start < len(picks):
        # as many layers at once as whole numbers tell apart
        end, size = start + 1, len(model.columns[start])
        while end < len(picks) and size * len(model.columns[end]) <= STEPS:
            size *= len(model.columns[end])
            end += 1
        places = [[0.0] * len(row) for row in model.columns]
        for i in range(start, end):
            size //= len(model.columns[i])
            places[i] = [float(j * size) for j in range(len(model.columns[i]))]
        if any(picks[start:end]):
            picks = _least(model, places, rows) or picks
        rows += [Row(weights={model.columns[i][picks[i]]: 1.0}, low=1.0) for i in range(start, end)]
        start = end
    return picks


def _least(model: Model, numbers: Sequence[Sequence[float]], rows: Sequence[Row]) -> list[int] | None:
    return model.best(model.costs(numbers), rows)


def _at_most(model: Model, numbers: Sequence[Sequence[float]], picks: Sequence[int]) -> Row:
    """The row that keeps the sum of whole numbers at what it is for these picks."""
    total = sum(row[j] for row, j in zip(numbers, picks, strict=True))
    scale = max(total, 1)
    return Row(weights={c: x / scale for c, x in model.costs(numbers).items() if x}, high=(total + 0.5) / scale)


def _undominated(
    options: Sequence[Option], units: Sequence[int], lost: float, over: Sequence[float]
) -> list[tuple[int, int]]:
    """(rank, units of score) of the options that the answer may hold.

    Left out is what alone loses more than the best answer, and what an earlier option beats or equals in score and in
    every use; of a changed and an unchanged one, the unchanged is the earlier.
    """
    names = sorted({name for option in options for name in option.uses})
    uses = [[option.uses.get(name, 0) for name in names] for option in options]
    kept: list[int] = []
    for j, option in enumerate(options):
        if over[j] > lost * (1 + 1e-6):
            continue
        beaten = any(
            units[k] <= units[j]
            and options[k].agrees in (None, option.agrees)
            and all(a <= b for a, b in zip(uses[k], uses[j], strict=True))
            for k in kept
        )
        if not beaten:
            kept.append(j)
    return [(j, units[j]) for j in kept]


def _checked(layers: Layers, limits: Sequence[Limit]) -> tuple[list[list[Option]], list[Limit]]:
    """Options and limits in the order of the rule."""
    limits = sorted(limits, key=lambda limit: limit.name)
    names = [limit.name for limit in limits]
    if len(set(names)) < len(names):
        raise ValueError(f"limits {names}: each needs a name of its own")
    if not layers:
        raise ValueError("layers: there is nothing to choose; give the options of at least one layer")
    for limit in limits:
        if not math.isfinite(limit.ceiling) or not math.isfinite(limit.fixed):
            raise ValueError(f"limit {limit.name}: ceiling={limit.ceiling}, fixed={limit.fixed} must be finite numbers")
    for i, options in enumerate(layers):
        if not options:
            raise ValueError(f"layer {i} has no options; keeping it as it is should be one")
        if len({option.name for option in options}) < len(options):
            raise ValueError(f"layer {i} has two options of one name: {[option.name for option in options]}")
        for option in options:
            for what, number in [("score", option.score), *option.uses.items()]:
                if not math.isfinite(number):
                    raise ValueError(f"layer {i}, option {option.name!r}: {what}={number} must be a finite number")

    def place(option: Option) -> tuple[bool, list[float], str]:
        return option.changed, [option.uses.get(name, 0) for name in names], option.name

    return [sorted(options, key=place) for options in layers], limits


def _scaled(layers: Layers, limit: Limit) -> list[list[float]]:
    """The uses of a limit above each layer's least, with a largest of 1."""
    uses = [[option.uses.get(limit.name, 0) for option in options] for options in layers]
    over = [[use - min(row) for use in row] for row in uses]
    largest = max(max(row) for row in over) or 1
    return [[x / largest for x in row] for row in over]


def _least_share(layers: Layers, limits: Sequence[Limit]) -> float:
    """The share t by which all ceilings must rise so that one choice keeps them all."""
    soft = [limit for limit in limits if not limit.hard]
    for limit in soft:
        if limit.ceiling <= 0:
            raise ValueError(f"limit {limit.name}: ceiling={limit.ceiling} must be more than 0")
    model = Model(layers, [limit for limit in limits if limit.hard])
    share = model.program.column(upper=float("inf"), whole=False)
    rows = []
    for limit in soft:
        weights = model.costs([[option.uses.get(limit.name, 0) / limit.ceiling for option in row] for row in layers])
        rows.append(Row(weights=weights | {share: -1.0}, high=1 - limit.fixed / limit.ceiling))
    picks = model.best({share: 1.0}, rows)
    assert picks is not None, "a share large enough makes room for anything"
    chosen = [options[j] for options, j in zip(layers, picks, strict=True)]
    return max(used(limit, chosen) / limit.ceiling - 1 for limit in soft)


def _ceiled(limit: Limit, share: float) -> float:
    raised = limit.ceiling * (1 + share)
    return math.ceil(raised) if isinstance(limit.ceiling, int) else raised


def _raised(layers: Layers, limits: Sequence[Limit], ceilings: Mapping[str, float]) -> Nearest:
    there = [replace(limit, ceiling=ceilings.get(limit.name, limit.ceiling)) for limit in limits]
    solution = solve(layers, there)
    assert solution is not None, "a budget that a choice keeps has an answer"
    return Nearest(raised=ceilings, solution=solution)
