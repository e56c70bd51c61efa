"""A budget: ceilings on what a model may cost, and a verdict that names the first one it breaks and by how much.

    budget = Budget(total_bytes=22 * GIB, min_speedup=1.2).against(costs.total(teacher))
    verdict = budget.verdict(config, costs)          "total_bytes 26.07 GiB exceeds 22 GiB by 4.07 GiB (18.5 %)"

A speedup is a ceiling on time once the teacher's time is known: `against` turns one into the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from plait.compress.costs import Costs, LayerCosts
from plait.model.config import ModelConfig

# what can be limited, in the order in which it is looked at: field of Budget and of LayerCosts -> unit
LIMITS: Mapping[str, str] = {
    "params": "",
    "weight_bytes": "bytes",
    "total_bytes": "bytes",
    "prefill_s": "s",
    "decode_s": "s",
}
# share of a ceiling by which a number that is not whole may exceed it
SLACK = 1e-9
SPEEDUPS = {"min_prefill_speedup": "prefill_s", "min_speedup": "decode_s"}


class BudgetError(ValueError):
    """No model, or not this one, is within the budget; the message says which limit is in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """ok; otherwise limit: the first that is broken, value: what the model has, ceiling: what it may have."""

    ok: bool
    limit: str | None = None
    value: float = 0.0
    ceiling: float = math.inf

    @property
    def by(self) -> float:
        """How much too much, in the limit's unit; 0 within the budget."""
        return 0.0 if self.ok else self.value - self.ceiling

    def __str__(self) -> str:
        if self.ok or self.limit is None:
            return "within the budget"
        unit = LIMITS[self.limit]
        value, ceiling, by = (_shown(x, unit) for x in (self.value, self.ceiling, self.by))
        share = f" ({self.by / self.ceiling:.1%})" if self.ceiling else ""
        return f"{self.limit} {value} exceeds {ceiling} by {by}{share}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Ceilings; None where there is none.

    params: numbers. weight_bytes, total_bytes: bytes. prefill_s, decode_s: seconds, as LayerCosts counts them.
    min_speedup, min_prefill_speedup: times the teacher's speed of a decode step, of reading prompts.
    """

    params: int | None = None
    weight_bytes: float | None = None
    total_bytes: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    min_speedup: float | None = None
    min_prefill_speedup: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}={value!r}: must be a number above 0, or left out")

    def against(self, teacher: LayerCosts) -> "Budget":
        """The same budget with speedups turned into ceilings on time; the lower one where there is one already.

        Args:
            teacher: `costs.total` of the model that is to be beaten.

        Raises: ValueError if its times are not known.
        """
        found: dict[str, float | None] = {}
        for name, limit in SPEEDUPS.items():
            factor, time = getattr(self, name), getattr(teacher, limit)
            if factor is None:
                continue
            if not math.isfinite(time):
                raise ValueError(f"{name}={factor} needs a clock: name a machine, or measure on this one")
            given = getattr(self, limit)
            found |= {name: None, limit: min(time / factor, math.inf if given is None else given)}
        return replace(self, **found)  # type: ignore[arg-type]

    def ceilings(self) -> dict[str, float]:
        """The limits that are set, in order: name of a field of LayerCosts -> ceiling.

        Raises: ValueError for a speedup that `against` has not turned into a time yet.
        """
        for name in SPEEDUPS:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing yet; call budget.against(teacher's costs)"
                )
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}

    def sizes(self) -> "Budget":
        """Its limits that need no clock."""
        return replace(self, **dict.fromkeys(SPEEDUPS.values()), **dict.fromkeys(SPEEDUPS))  # type: ignore[arg-type]

    def verdict(self, config: ModelConfig, costs: Costs) -> Verdict:
        """Whether a model is within the budget."""
        return self.judge(costs.total(config))

    def judge(self, total: LayerCosts) -> Verdict:
        """Whether these costs are within the budget.

        Raises: ValueError for a limit on a time that no clock has told, and as `ceilings`.
        """
        for limit, ceiling in self.ceilings().items():
            value = getattr(total, limit)
            if math.isnan(value):
                raise ValueError(f"{limit}={ceiling:g} needs a clock: name a machine, or measure on this one")
            # whole bytes and numbers are exact, sums of times are so to their last bits
            slack = 0.0 if float(value).is_integer() else SLACK * ceiling
            if value > ceiling + slack:
                return Verdict(ok=False, limit=limit, value=value, ceiling=ceiling)
        return Verdict(ok=True)

    def require(self, config: ModelConfig, costs: Costs) -> None:
        """Refuse a model outside the budget.

        Raises: BudgetError with the verdict.
        """
        verdict = self.verdict(config, costs)
        if not verdict.ok:
            raise BudgetError(f"{config.name or config.pattern}: {verdict}")


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        for name, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= scale:
                return f"{value / scale:.4g} {name}"
        return f"{value:.0f} bytes"
    if unit == "s":
        return f"{value * 1e3:.4g} ms" if value < 1 else f"{value:.4g} s"
    return f"{value:,.0f}"
