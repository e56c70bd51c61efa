"""Says why each layer became what it is: its alternatives, what they cost and lose, and what the next best would have.

    price of an option  =  its score + sum over limits of (price of the limit x what it uses)

At the prices of the solution, each layer takes about the cheapest of its options; the next best is the one that would
have cost least more. Prices are those of the relaxed program, in which fractions of options are allowed: where whole
options leave room over, a chosen one may be dearer than another by a little.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.compress.budget import LIMITS
from plait.compress.choice import Limit, Option
from plait.compress.solve import Nearest, Solution
from plait.model.config import ModelConfig
from plait.model.layers import KINDS

# share of two prices below which they do not differ
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """An option as it is weighed: score, uses by limit, price in score; chosen: whether it was."""

    name: str
    score: float
    uses: Mapping[str, float]
    price: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """A layer: alternatives by price, the cheapest first; why: one sentence."""

    layer: int
    kind: str
    alternatives: tuple[Alternative, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """score, base: expected, and the part of the model's width. limits: what is used of each, and its price."""

    score: float
    base: float
    limits: tuple[Mapping[str, object], ...]
    layers: tuple[Why, ...]
    widths: Mapping[int, float | None]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        layers = [
            {
                "layer": why.layer,
                "kind": why.kind,
                "why": why.why,
                "alternatives": [
                    {"name": a.name, "score": a.score, "uses": dict(a.uses), "price": a.price, "chosen": a.chosen}
                    for a in why.alternatives
                ],
            }
            for why in self.layers
        ]
        return {
            "score": self.score,
            "base": self.base,
            "limits": [dict(limit) for limit in self.limits],
            "widths": {str(d): score for d, score in self.widths.items()},
            "layers": layers,
        }

    def text(self, layer: int | None = None) -> str:
        """For a terminal: the limits and a line per layer; or all alternatives of one layer."""
        if layer is not None:
            return _of_layer(self.layers[layer])
        lines = [
            f"expected loss {self.score:.4g} nats a token"
            + (f", {self.base:.4g} of it the width's" if self.base else "")
        ]
        lines += [f"  {limit['text']}" for limit in self.limits]
        lines += [f"  layer {why.layer:3} {why.kind:9} {why.why}" for why in self.layers]
        return "\n".join(lines)


class Answer(Protocol):
    """What is explained: a Puzzle."""

    @property
    def score(self) -> float: ...
    @property
    def base(self) -> float: ...
    @property
    def solution(self) -> Solution: ...
    @property
    def layers(self) -> Sequence[Sequence[Option]]: ...
    @property
    def limits(self) -> Sequence[Limit]: ...
    @property
    def widths(self) -> Mapping[int, float | None]: ...


def explain(answer: Answer, teacher: ModelConfig) -> Explanation:
    """Why a search ended as it did.

    Args:
        answer: a Puzzle. teacher: whose layers they were.
    """
    prices = answer.solution.prices
    budget = [limit for limit in answer.limits if not limit.hard]
    units = {limit.name: limit.unit for limit in budget}
    layers = []
    for i, (options, chosen) in enumerate(zip(answer.layers, answer.solution.chosen, strict=True)):
        weighed = [
            Alternative(
                name=option.name,
                score=option.score,
                uses={name: use for name, use in option.uses.items() if name in units},
                price=option.score + sum(prices[name] * option.uses.get(name, 0) for name in units),
                chosen=option.name == chosen.name,
            )
            for option in options
        ]
        weighed.sort(key=lambda a: (a.price, not a.chosen, a.name))
        kind = KINDS[teacher.layers[i].symbol].name
        is_alike = any(option.agrees is not None for option in options)
        layers.append(Why(layer=i, kind=kind, alternatives=tuple(weighed), why=_why(weighed, units, is_alike)))
    limits = []
    for limit in budget:
        used, price = answer.solution.used[limit.name], prices[limit.name]
        share = f"{shown(used, limit.unit)} of {shown(limit.ceiling, limit.unit)}"
        text = f"{limit.name} {share}, {_priced(price, limit)}"
        limits.append(
            {
                "name": limit.name,
                "unit": limit.unit,
                "used": used,
                "ceiling": limit.ceiling,
                "price": price,
                "text": text,
            }
        )
    return Explanation(
        score=answer.score, base=answer.base, limits=tuple(limits), layers=tuple(layers), widths=answer.widths
    )


def nearest_text(found: Sequence[Nearest], ceilings: Mapping[str, float], *, is_scored: bool = True) -> str:
    """What to tell somebody whose budget nothing fits; is_scored: whether what is lost there is known."""
    asked = ", ".join(f"{name} {shown(at, LIMITS.get(name, ''))}" for name, at in ceilings.items())
    lines = []
    for near in found:
        raised = " and ".join(
            f"{name} {enough(at, LIMITS.get(name, ''))} (+{at / ceilings[name] - 1:.1%})"
            for name, at in near.raised.items()
        )
        lines.append(raised + (f", which loses about {near.solution.score:.4g} nats a token" if is_scored else ""))
    near = "; or\n".join(lines) or "none, however any one limit is raised"
    return f"no model is within {asked}. The nearest that is possible:\n{near}."


SCALES: Mapping[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")),
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "": ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, "")),
}


def shown(value: float, unit: str) -> str:
    """A number of this unit for people."""
    scale, name = _scale(abs(value), unit)
    return f"{value / scale:.4g} {name}".strip()


def enough(value: float, unit: str) -> str:
    """A number of this unit for people, who may ask for it as it stands: it is never less than the value."""
    if not unit or not value:
        return f"{math.ceil(value):,}"
    scale, name = _scale(value, unit)
    step = 10.0 ** (math.floor(math.log10(value / scale)) - 3)
    return f"{math.ceil(value / scale / step - 1e-9) * step:.4g} {name}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    """The largest scale of a unit that a value reaches, else the smallest."""
    scales = SCALES.get(unit, ((1, unit),))
    return next((row for row in scales if value >= row[0]), scales[-1])


def _priced(price: float, limit: Limit) -> str:
    if not price:
        return "more of it would bring nothing"
    # a price holds for a little more only
    scale, name = _scale(limit.ceiling / 10, limit.unit)
    return f"one more {name} would save about {price * scale:.3g}"


def _why(weighed: Sequence[Alternative], units: Mapping[str, str], is_alike: bool) -> str:
    chosen = next(a for a in weighed if a.chosen)
    others = [a for a in weighed if not a.chosen]
    head = f"{chosen.name}, loses {chosen.score:.3g}"
    if not others:
        return f"{head}; there was no other"
    other = others[0]
    more = other.price - chosen.price
    if abs(more) < ROUNDING * (abs(other.price) + abs(chosen.price)):
        more = 0.0
    saved = []
    for name, use in other.uses.items():
        over = use - chosen.uses.get(name, 0)
        if name in units and over:
            saved.append(f"{shown(abs(over), units[name])} {'more' if over > 0 else 'less'}")
    uses = f" and takes {', '.join(saved)}" if saved else ""
    why_not = "its kind must be alike everywhere" if is_alike else "does not fill the budget as well"
    verdict = f"{-more:.3g} cheaper in all, but {why_not}" if more < 0 else f"{more:.3g} dearer in all"
    if not more:
        verdict = "as dear in all"
    return f"{head}; next best {other.name} loses {other.score:.3g}{uses}: {verdict}"


def _of_layer(why: Why) -> str:
    wide = max(len(a.name) for a in why.alternatives)
    lines = [f"layer {why.layer}, {why.kind}: {why.why}"]
    for a in why.alternatives:
        uses = "  ".join(f"{name} {shown(use, LIMITS.get(name, ''))}" for name, use in a.uses.items())
        lines.append(
            f"  {'>' if a.chosen else ' '} {a.name:<{wide}}  loses {a.score:<10.4g} price {a.price:<10.4g} {uses}"
        )
    return "\n".join(lines)
