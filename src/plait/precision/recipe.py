"""A precision recipe: which linear layer of a model computes in which numbers.

A recipe is data: a compute dtype, ordered rules (role pattern and place -> LinearFormat; the first match wins), and
perhaps a switch late in training. It is also the factory of linear layers: a model asks `recipe.linear(d_in, d_out,
role=...)`, never mentions a dtype, and when it is whole lets `place.settle` tell each layer where it stands. Roles are
such as "mamba2.in_proj"; the head has the role "head", which no pattern but that word matches. Embeddings, norms,
routers, stacked experts and the state-space parameters always stay high, and so does a layer whose rows do not divide
into the groups of codes that are held without a master.

Places count matrix products as the papers do: projections of one input (q, k and v; up and gate) are one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch

from plait.ops.quant import fits_groups
from plait.precision.format import HIGH, LinearFormat
from plait.precision.linear import Linear, Parts
from plait.precision.ternary_packed import TernaryLinear
from plait.precision.weight_only import WeightOnlyLinear

# endings of names; exponentials and tiny differences hang on these, half precision loses both
ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias", ".router.correction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a linear layer stands: product i of n, in block b of B; both count from 0."""

    i: int
    n: int
    b: int
    B: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """role: a shell pattern over roles such as "attention.q_proj" or "mlp.*"; format: what they compute in.

    first, last: only the first or last so many products, or such a share of all if it is no whole number. blocks: only
    in these blocks, such as "0:2, -8:, 17". With several of these, any will do.
    """

    role: str = "*"
    first: int | float = 0
    last: int | float = 0
    blocks: str = ""
    format: LinearFormat

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name}={value}: give a number of products, or a share of all between 0 and 1")
        _blocks(self.blocks, 1)
        self.format.check()

    def matches(self, role: str, place: Place | None) -> bool:
        """Whether a layer is meant; without a place, rules for places are not."""
        if not (role == self.role if "head" in (role, self.role) else fnmatchcase(role, self.role)):
            return False
        if not (self.first or self.last or self.blocks):
            return True
        if place is None:
            return False
        first, last = (_count(share, place.n) for share in (self.first, self.last))
        return place.i < first or place.i >= place.n - last or place.b in _blocks(self.blocks, place.B)

    def __str__(self) -> str:
        words = [f"role={self.role!r}"]
        words += [f"{name}={getattr(self, name)!r}" for name in ("first", "last", "blocks") if getattr(self, name)]
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """at: the share of all steps after which it is on; what: "whole" layers, or their "forward" product, go high."""

    at: float
    what: Literal["whole", "forward"] = "whole"

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise ValueError(f"at={self.at}: must be a share of the run's steps, between 0 and 1")

    def later(self, form: LinearFormat) -> LinearFormat:
        """What a format becomes."""
        return HIGH if self.what == "whole" else replace(form, fprop=(None, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradual:
    """Weights of a trained model become rounded ones little by little: w = (1 - s) W + s Q(W).

    until: the share of the run's steps over which s grows in a straight line, from 0 at the first step to 1.

    Source   Mekkouri et al. 2024, "Fine-tuning LLMs to 1.58bit" (Hugging Face): warm-up of quantisation.
    """

    until: float

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise ValueError(f"until={self.until}: must be a share of the run's steps, between 0 and 1")

    def share(self, step: int, steps: int) -> float:
        """s of the update after `step` of `steps`."""
        last = round(self.until * steps)
        return min(step / last, 1.0) if last else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRecipe:
    """name: how users ask for it; compute: torch dtype of activations and products; rules: see the module.

    switch: late in training. gradual: early in it. tensor_cores: refuse to train where few bits would be emulated.
    base: the recipe that this one was written as a change of, with n_own rules of its own before what it keeps of the
    base's. copies_head: a head that is tied to the embedding gets codes of its own.
    """

    name: str
    compute: torch.dtype = torch.bfloat16
    rules: tuple[Rule, ...] = ()
    switch: Switch | None = None
    tensor_cores: bool = False
    base: str = ""
    n_own: int = 0
    copies_head: bool = False
    gradual: Gradual | None = None

    @property
    def weight_only(self) -> bool:
        """Whether it holds weights as codes without masters: a recipe for inference."""
        return any(rule.format.weight is not None and rule.format.weight.is_held for rule in self.rules)

    @property
    def is_needed(self) -> bool:
        """Whether a model trained in it is another without it, as ternary ones are; the others can run in BF16 too."""
        return any(w.is_held or w.element == "ternary" for rule in self.rules for w in rule.format.weights)

    @property
    def masters(self) -> "PrecisionRecipe":
        """The recipe whose weights are drawn: itself, or the plain one of its dtype where it holds codes."""
        return replace(self, rules=(), n_own=0, copies_head=False) if self.weight_only else self

    def format(self, role: str, place: Place | None = None) -> LinearFormat:
        """The format of the linear layers with this role, or of the one at this place."""
        return next((rule.format for rule in self.rules if rule.matches(role, place)), HIGH)

    def linear(
        self, d_in: int, d_out: int, *, role: str, bias: bool = False, parts: Parts = ()
    ) -> Linear | WeightOnlyLinear:
        """A linear layer that computes as this recipe says, with uninitialised weights.

        Args:
            d_in, d_out: its sizes.
            role: what it is to its layer.
            bias: whether it has one.
            parts: names and rows of what a fused weight consists of, first to last.
        """
        return self.layer(d_in, d_out, role=role, bias=bias, parts=parts, form=self.format(role))

    def layer(
        self, d_in: int, d_out: int, *, role: str, bias: bool, parts: Parts, form: LinearFormat
    ) -> Linear | WeightOnlyLinear:
        """A linear layer that computes in this format; plain where its rows do not fit the groups of codes."""
        if form.weight is not None and form.weight.is_held:
            if form.weight.element == "ternary":
                return TernaryLinear(d_in, d_out, bias=bias, form=form, role=role, parts=parts)
            if fits_groups(d_in, form.weight.group):
                return WeightOnlyLinear(d_in, d_out, bias=bias, weight=form.weight, role=role)
            form = HIGH
        return Linear(d_in, d_out, bias=bias, number_format=form, role=role, parts=parts)

    def computing_in(self, dtype: torch.dtype) -> "PrecisionRecipe":
        """The same rules over another compute dtype."""
        return replace(self, compute=dtype)

    def is_late(self, step: int, steps: int) -> bool:
        """Whether the late switch is on for the update after `step` of `steps`."""
        return self.switch is not None and step >= round(self.switch.at * steps)

    def share(self, step: int, steps: int) -> float:
        """How far weights are rounded in the update after `step` of `steps`, 1 for recipes that are not gradual."""
        return 1.0 if self.gradual is None else self.gradual.share(step, steps)

    def decides(self, seed: int, steps: int) -> dict[str, object]:
        """What of it decides the numbers of a run, JSON-ready; a run is not resumed with another."""
        found: dict[str, object] = {"precision": self.to_dict()}
        if any(rule.format.is_stochastic for rule in self.rules):
            found["rounding_seed"] = seed
        if self.switch is not None:
            found["switch_step"] = round(self.switch.at * steps)
        if self.gradual is not None:
            found["gradual_steps"] = round(self.gradual.until * steps)
        return found

    @classmethod
    def from_dict(cls, data: object) -> "PrecisionRecipe":
        """A recipe by name, from a file, or as a table; errors are those of `reading.read`."""
        from plait.precision.reading import read

        return read(data)

    def to_dict(self) -> str | Mapping[str, object]:
        """The name of a known recipe, or the table that `from_dict` reads."""
        from plait.precision.reading import write

        return write(self)


def _count(share: int | float, n: int) -> int:
    """How many of n: a number as it is, a share rounded up."""
    # 0.07 of 100 is 7.000000000000001 in binary
    return int(share) if isinstance(share, int) or share > 1 else math.ceil(round(share * n, 9))


def _blocks(text: str, n: int) -> frozenset[int]:
    """The block numbers that "0:2, -8:, 17" means in a model of n.

    Raises: ValueError saying how to write it.
    """
    found: set[int] = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        ends = word.split(":")
        try:
            numbers = [int(end) if end.strip() else None for end in ends]
            if len(ends) == 1:
                numbers = [int(word), int(word) + 1 or None]
            found |= set(range(n)[slice(*numbers)])
        except (ValueError, TypeError):
            raise ValueError(f"blocks={text!r}: {word!r} is not understood; write for example '0:2, -8:, 17'") from None
    return frozenset(found)
