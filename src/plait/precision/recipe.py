"""A precision recipe: which linear layer of a model computes in which numbers.

A recipe is data: a compute dtype, and ordered rules (role pattern -> LinearFormat; the first match wins). It is also
the factory of linear layers: a model asks `recipe.linear(d_in, d_out, role=...)` and never mentions a dtype. The head
has the role "head", the layers' projections "mamba2.in_proj" and the like.
Embeddings, norms, routers, stacked experts and the state-space parameters always stay high, and so does a layer whose
rows its format cannot divide into groups.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from plait.ops.quant import fits_groups
from plait.precision.format import HIGH, LinearFormat
from plait.precision.linear import Linear
from plait.precision.weight_only import WeightOnlyLinear

# endings of names; exponentials and tiny differences hang on these, half precision loses both
ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias", ".router.correction", ".gamma", ".left", ".right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """role: a shell pattern over roles such as "attention.q_proj" or "mlp.*"; format: what they compute in."""

    role: str
    format: LinearFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRecipe:
    """name: how users ask for it; compute: torch dtype of activations and products; rules: see the module."""

    name: str
    compute: torch.dtype = torch.bfloat16
    rules: tuple[Rule, ...] = ()

    @property
    def weight_only(self) -> bool:
        """Whether it holds weights as codes without masters: a recipe for inference."""
        return any(rule.format.weight is not None and rule.format.weight.scale == "group" for rule in self.rules)

    @property
    def masters(self) -> "PrecisionRecipe":
        """The recipe whose weights are drawn: itself, or the plain one of its dtype where it holds codes."""
        return replace(self, rules=()) if self.weight_only else self

    def format(self, role: str) -> LinearFormat:
        """The format of the linear layers with this role."""
        return next((rule.format for rule in self.rules if fnmatchcase(role, rule.role)), HIGH)

    def linear(self, d_in: int, d_out: int, *, role: str, bias: bool = False) -> Linear | WeightOnlyLinear:
        """A linear layer that computes as this recipe says, with uninitialised weights."""
        form = self.format(role)
        if form.weight is not None and form.weight.scale == "group":
            if fits_groups(d_in, form.weight.group):
                return WeightOnlyLinear(d_in, d_out, bias=bias, weight=form.weight)
            form = HIGH
        return Linear(d_in, d_out, bias=bias, number_format=form)

    def computing_in(self, dtype: torch.dtype) -> "PrecisionRecipe":
        """The same rules over another compute dtype."""
        return replace(self, compute=dtype)
