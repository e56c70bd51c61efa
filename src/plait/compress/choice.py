"""The integer program of one option per layer: its columns, its rows, and what a choice uses of each limit.

    sum_j x_ij = 1 for every layer i,    fixed_k + sum_ij use_ijk x_ij <= ceiling_k for every limit k,    x in {0, 1}
    x_ij <= y_fv where option ij is of value v in family f,    sum_v y_fv <= 1

Numbers  whole uses (bytes, parameters) are summed and compared exactly, others (seconds) to a billionth of the ceiling.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plait.compress.program import TOLERANCE, Program, Row

# units of a limit up to which a row of whole numbers is exact for the solver
EXACT = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to fill a layer.

    name: unique in its layer. score: what it loses, any finite number. uses: of each limit, by name; absent is 0.
    changed: whether the layer is another than it was. agrees: (family, value): all chosen options of one family have
    the same value, as where all layers of a kind must be alike; None takes no part in that.
    """

    name: str
    score: float
    uses: Mapping[str, float]
    changed: bool = True
    agrees: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """fixed + the uses of all layers stay within the ceiling.

    unit: for people, such as "bytes" or "s". hard: not part of a budget, and never raised.
    """

    name: str
    ceiling: float
    fixed: float = 0
    unit: str = ""
    hard: bool = False

    def keeps(self, used: float) -> bool:
        """Whether a total is within the ceiling: exactly for whole numbers, to a billionth otherwise."""
        if isinstance(used, int):
            return used <= self.ceiling
        return used <= self.ceiling + TOLERANCE * abs(self.ceiling)


Layers = Sequence[Sequence[Option]]


def used(limit: Limit, chosen: Sequence[Option]) -> float:
    """What a choice uses of a limit in all; a whole number if every part of it is one."""
    parts = [limit.fixed, *(option.uses.get(limit.name, 0) for option in chosen)]
    return sum(parts) if all(isinstance(part, int) for part in parts) else math.fsum(parts)


class Model:
    """The program of one choice: which columns stand for which options, and the rows of the limits."""

    def __init__(self, layers: Layers, limits: Sequence[Limit]) -> None:
        self.layers, self.limits, self.is_tight = layers, limits, False
        self.program = Program()
        self.columns = [[self.program.column() for _ in options] for options in layers]
        self.program.rows += [Row(weights=dict.fromkeys(row, 1.0), low=1.0, high=1.0) for row in self.columns]
        self._agree()
        self.first_limit = len(self.program.rows)
        # rows in whole numbers are exact; others may be kept a little too generously, and are checked
        self.scales = []
        for limit in limits:
            row, scale = _row(layers, self.columns, limit)
            self.program.rows.append(row)
            self.scales.append(scale)

    def _agree(self) -> None:
        families: dict[str, dict[str, int]] = {}
        flat = [option for options in self.layers for option in options]
        for option, column in zip(flat, itertools.chain(*self.columns), strict=True):
            if option.agrees is not None:
                family, value = option.agrees
                values = families.setdefault(family, {})
                if value not in values:
                    values[value] = self.program.column()
                self.program.rows.append(Row(weights={column: 1.0, values[value]: -1.0}, high=0.0))
        for values in families.values():
            self.program.rows.append(Row(weights=dict.fromkeys(values.values(), 1.0), high=1.0))

    def costs(self, numbers: Sequence[Sequence[float]]) -> dict[int, float]:
        """A number for every option, by its column."""
        pairs = zip(self.columns, numbers, strict=True)
        return {column: x for row, values in pairs for column, x in zip(row, values, strict=True)}

    def best(self, costs: Mapping[int, float], more: Sequence[Row] = ()) -> list[int] | None:
        """Which option each layer takes at an optimum that keeps every limit; None if there is none."""
        while True:
            values = self.program.minimise(costs, more)
            if values is None:
                return None
            picks = [_largest([values[column] for column in row]) for row in self.columns]
            chosen = [options[j] for options, j in zip(self.layers, picks, strict=True)]
            if all(limit.keeps(used(limit, chosen)) for limit in self.limits):
                return picks
            assert not self.is_tight, "a row that is held away from its bound cannot be broken"
            self._tighten()

    def _tighten(self) -> None:
        """Hold every row so far from its bound that the solver's tolerance cannot break it."""
        self.is_tight = True
        rows = self.program.rows
        for i in range(self.first_limit, self.first_limit + len(self.limits)):
            rows[i] = replace(rows[i], high=rows[i].high - 4 * TOLERANCE)

    def prices(self, scores: Sequence[Sequence[float]], spread: float) -> dict[str, float]:
        """What the score falls by when a ceiling rises by one, by limit; `spread` is about the size of the scores."""
        duals = self.program.prices(self.costs([[s / spread for s in row] for row in scores]))
        assert duals is not None, "a program with an answer in whole numbers has one in fractions"
        found = duals[self.first_limit :]
        return {
            limit.name: max(0.0, -dual * spread / scale)
            for limit, dual, scale in zip(self.limits, found, self.scales, strict=True)
        }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _row(layers: Layers, columns: Sequence[Sequence[int]], limit: Limit) -> tuple[Row, float]:
    """The row of a limit, with a largest weight or bound of about 1, and what 1 stands for there."""
    uses = [[option.uses.get(limit.name, 0) for option in options] for options in layers]
    least = [min(row) for row in uses]
    over = [[use - low for use in row] for row, low in zip(uses, least, strict=True)]
    numbers = [limit.fixed, *least]
    room = limit.ceiling - (sum(numbers) if all(isinstance(n, int) for n in numbers) else math.fsum(numbers))
    flat = [x for row in over for x in row]
    whole = math.gcd(*flat) if all(isinstance(x, int) for x in flat) and flat else 0  # type: ignore[arg-type]
    if whole and abs(room) / whole <= EXACT and max(flat) / whole <= EXACT:
        # half a unit of room tells "fits" from "does not", whatever the solver's rounding
        scale, high = whole * max(1.0, room // whole), room // whole + 0.5
        high = high * whole / scale
    else:
        scale = max(abs(room), *flat, 1e-300)
        high = (room + (0 if whole else TOLERANCE * abs(limit.ceiling))) / scale
    weights = {c: x / scale for c, x in zip(itertools.chain(*columns), flat, strict=True) if x}
    # an empty row must still say when its room is less than nothing
    return Row(weights=weights or {columns[0][0]: 0.0}, high=high), scale
