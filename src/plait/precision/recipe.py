"""A precision recipe: which linear layer of a model computes in which numbers.

A recipe is data: a compute dtype, and ordered rules (role pattern -> LinearFormat; the first match wins). It is also
the factory of Linears: layers ask `recipe.linear(d_in, d_out, role=...)` and never mention a dtype.
Embeddings, head, norms, routers and the state-space parameters always stay high.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from plait.precision.format import HIGH, LinearFormat
from plait.precision.linear import Linear


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

    def format(self, role: str) -> LinearFormat:
        """The format of the linear layers with this role."""
        return next((rule.format for rule in self.rules if fnmatchcase(role, rule.role)), HIGH)

    def linear(self, d_in: int, d_out: int, *, role: str, bias: bool = False) -> Linear:
        """A linear layer that computes as this recipe says, with uninitialised weights."""
        return Linear(d_in, d_out, bias=bias, number_format=self.format(role))

    def computing_in(self, dtype: torch.dtype) -> "PrecisionRecipe":
        """The same rules over another compute dtype."""
        return replace(self, compute=dtype)
