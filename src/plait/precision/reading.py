"""Reads a precision recipe from its name, a TOML file or a table, and writes it back.

base = "nvfp4"                              begin with this recipe ("bf16" if not given)
switch = {at = 0.9, what = "forward"}       after 90 % of the steps the forward product goes high; "whole": all three
gradual = {until = 0.5}                     weights go from plain to rounded over half of the steps: for a trained model
tensor_cores = true                         refuse devices that would emulate it
keeps_rules = false                         leave out the base's rules, such as its layers in BF16
[[rules]]                                   before the base's rules; the first that matches wins
role = "mamba2.out_proj"                    a pattern; first, last, blocks say where
format = "mxfp8"                            that of a recipe's layers, or a table with fprop, dgrad, wgrad
[[rules]]
last = 0.25
[rules.format]                              (x, W), (dy, W), (dy, x); "none" is the compute dtype
fprop = ["e2m1 1x16 e4m3", "e2m1 16x16 e4m3"]
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from plait.config import ConfigError, load, nearest, read_fields, to_dict
from plait.precision.format import HIGH, LinearFormat
from plait.precision.recipe import Gradual, PrecisionRecipe, Rule, Switch

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """What a rule's format may be in a file: a name, or pairs of formats."""

    format: LinearFormat

    @classmethod
    def from_dict(cls, data: object) -> "_Format":
        if isinstance(data, Mapping):
            form = read_fields(LinearFormat, data)
            form.check()
            return cls(format=form)
        if data not in formats():
            raise _unknown("format", data, formats())
        return cls(format=formats()[str(data)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    role: str = "*"
    first: int | float = 0
    last: int | float = 0
    blocks: str = ""
    format: _Format

    def __post_init__(self) -> None:
        self.rule()

    def rule(self) -> Rule:
        return Rule(role=self.role, first=self.first, last=self.last, blocks=self.blocks, format=self.format.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    name: str = ""
    base: str = "bf16"
    compute: Literal["bf16", "fp32"] | None = None
    keeps_rules: bool = True
    rules: tuple[_Rule, ...] = ()
    switch: Switch | None = None
    gradual: Gradual | None = None
    tensor_cores: bool = False


def formats() -> dict[str, LinearFormat]:
    """Formats by the names of the recipes whose layers compute in them."""
    from plait.precision import RECIPES

    return {name: recipe.rules[-1].format if recipe.rules else HIGH for name, recipe in RECIPES.items()}


def read(data: object, name: str = "") -> PrecisionRecipe:
    """A recipe.

    Args:
        data: a known name, the path of a TOML file, or a table; see the file. Also a table as JSON, of `needed`.
        name: of a recipe from a table that gives none.

    Raises: ConfigError naming the field, the value and what is known.
    """
    from plait.precision import RECIPES

    if isinstance(data, PrecisionRecipe):
        return data
    if isinstance(data, Mapping):
        table = read_fields(_Table, data)
    elif str(data) in RECIPES:
        return RECIPES[str(data)]
    elif str(data).startswith("{"):
        table = read_fields(_Table, _json(str(data)))
    elif str(data).endswith(".toml"):
        if not Path(str(data)).is_file():
            raise ConfigError(f"recipe={data!r}: there is no such file")
        try:
            table = load(_Table, Path(str(data)))
        except ConfigError as error:
            raise ConfigError(f"{data}: {error}") from None
        name = name or Path(str(data)).stem
    else:
        raise _unknown("recipe", data, RECIPES, "; or give the path of a TOML file")
    if table.base not in RECIPES:
        raise _unknown("base", table.base, RECIPES)
    base = RECIPES[table.base]
    own = tuple(rule.rule() for rule in table.rules)
    rules = own + (base.rules if table.keeps_rules else ())
    if table.gradual is not None:
        _check_gradual(rules)
    return replace(
        base,
        name=table.name or name or f"{table.base} changed",
        compute=base.compute if table.compute is None else _DTYPES[table.compute],
        rules=rules,
        switch=table.switch or base.switch,
        gradual=table.gradual or base.gradual,
        tensor_cores=table.tensor_cores,
        base=table.base,
        n_own=len(own),
    )


def write(recipe: PrecisionRecipe) -> str | dict[str, object]:
    """The name of a known recipe, or a table from which `read` makes the same one."""
    from plait.precision import RECIPES

    if RECIPES.get(recipe.name) == recipe:
        return recipe.name
    compute = next((name for name, dtype in _DTYPES.items() if dtype == recipe.compute), str(recipe.compute))
    n = recipe.n_own if recipe.base else len(recipe.rules)
    return {
        "name": recipe.name,
        "base": recipe.base or "bf16",
        "compute": compute,
        "keeps_rules": n < len(recipe.rules),
        "rules": [to_dict(rule) for rule in recipe.rules[:n]],
        **({} if recipe.switch is None else {"switch": to_dict(recipe.switch)}),
        **({} if recipe.gradual is None else {"gradual": to_dict(recipe.gradual)}),
        **({"tensor_cores": True} if recipe.tensor_cores else {}),
    }


def needed(recipe: PrecisionRecipe) -> str:
    """What a checkpoint says that its model needs: a known recipe's name, or the table of another as JSON.

    How it was trained is left out: switch, gradual rounding, tensor cores, compute dtype.
    """
    from plait.precision import RECIPES

    own = replace(recipe, compute=torch.bfloat16, switch=None, gradual=None, tensor_cores=False)
    for name in (own.name, own.base, *RECIPES):
        known = RECIPES.get(name)
        if known is not None and (known.rules, known.copies_head) == (own.rules, own.copies_head):
            return name
    return json.dumps(write(own))


def _json(text: str) -> Mapping[str, object]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe={text[:80]!r}: a table as JSON that cannot be read: {error}") from None


def _check_gradual(rules: tuple[Rule, ...]) -> None:
    weights = [form for rule in rules for form in rule.format.weights]
    if not weights or any(form.is_held for form in weights):
        raise ConfigError('gradual: no weight is rounded while it is trained; take base = "ternary", or leave it out')
    if any(form.hadamard for form in weights):
        raise ConfigError("gradual: a rotated weight cannot be mixed with a plain one; leave out hadamard or gradual")


def _unknown(field: str, value: object, known: Mapping[str, object], more: str = "") -> ConfigError:
    near = nearest(str(value), known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}{more}"
    return ConfigError(f"{field}={value!r} is unknown; {hint}")
