"""A small integer program, and its exact answer by HiGHS: the same on every machine.

    minimise c x   with   low <= A x <= high,   x in 0 .. upper, whole numbers or (for prices) any

One thread, one seed, no gap left open. Columns and rows should be scaled to about one by whoever makes them.

Source   Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5 (HiGHS).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import highspy

INFINITY = float("inf")
# of a scaled row; the solver's least is 1e-10
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """low <= sum of weight x column <= high."""

    weights: Mapping[int, float]
    low: float = -INFINITY
    high: float = INFINITY


@dataclass(slots=True, kw_only=True)
class Program:
    """Rows over columns. upper: of each column, from 0. whole: whether it is a whole number."""

    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def column(self, upper: float = 1.0, whole: bool = True) -> int:
        """A new column; returns its number."""
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.upper) - 1

    def minimise(self, costs: Mapping[int, float], more: Sequence[Row] = ()) -> list[float] | None:
        """Column values at an optimum under these rows and `more`; None if nothing satisfies them."""
        found = _solved(self, costs, more, relaxed=False)
        return None if found is None else list(found.getSolution().col_value)

    def prices(self, costs: Mapping[int, float]) -> list[float] | None:
        """What one more unit of each row's bound would change the minimum by, were fractions allowed; None as above."""
        found = _solved(self, costs, (), relaxed=True)
        return None if found is None else list(found.getSolution().row_dual)


def _solved(
    program: Program, costs: Mapping[int, float], more: Sequence[Row], *, relaxed: bool
) -> "highspy.Highs | None":
    highspy = _solver_module()
    rows = [*program.rows, *more]
    lp = highspy.HighsLp()
    n = len(program.upper)
    lp.num_col_, lp.num_row_ = n, len(rows)
    lp.col_cost_ = [float(costs.get(i, 0.0)) for i in range(n)]
    lp.col_lower_, lp.col_upper_ = [0.0] * n, list(program.upper)
    lp.row_lower_ = [max(row.low, -highspy.kHighsInf) for row in rows]
    lp.row_upper_ = [min(row.high, highspy.kHighsInf) for row in rows]
    starts, columns, weights = [0], [], []
    for row in rows:
        for column in sorted(row.weights):
            columns.append(column)
            weights.append(float(row.weights[column]))
        starts.append(len(columns))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = starts, columns, weights
    if not relaxed:
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in program.whole]
    solver = highspy.Highs()
    for name, value in _settings().items():
        solver.setOptionValue(name, value)
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    known = highspy.HighsModelStatus
    if status == known.kOptimal:
        return solver
    if status in (known.kInfeasible, known.kUnboundedOrInfeasible):
        return None
    raise RuntimeError(f"HiGHS ended with {solver.modelStatusToString(status)!r}, which is neither answer")


def _settings() -> dict[str, object]:
    return {
        "output_flag": False,
        "threads": 1,
        "parallel": "off",
        "random_seed": 0,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
        "dual_feasibility_tolerance": TOLERANCE,
    }


def _solver_module() -> ModuleType:
    try:
        import highspy
    except ImportError as error:
        raise ValueError(
            "the search over layers needs the solver HiGHS, which is not installed: pip install 'plait[compress]'"
        ) from error
    return highspy
