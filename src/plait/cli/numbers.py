"""What computes in what: the linear layers of a model and the formats that a precision recipe gives their products.

Layers that are alike share a line. A format stands below with the operands of its three products; "-" is the compute
dtype. Bytes of a weight are those of the operand that the forward product reads, without tensor-wide scales.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from plait.cli.drawing import Drawn, count
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.precision.format import HIGH, LinearFormat, Pair
from plait.precision.linear import Linear
from plait.precision.place import places
from plait.precision.recipe import PrecisionRecipe

PRODUCTS = ("x W", "dy W", "dy x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Layers that are alike. high: rows of the weight that stay in the compute dtype."""

    role: str
    shape: tuple[int, int]
    high: int
    form: LinearFormat
    blocks: tuple[int, ...]

    def bytes_per_weight(self, width: int) -> float:
        """Of the forward product's operand; `width` is that of the compute dtype."""
        share = 1.0 if self.form.weight is None else self.high / self.shape[0]
        rounded = 0.0 if self.form.weight is None else self.form.weight.bytes_per_number
        return share * width + (1 - share) * rounded


def lines(config: ModelConfig, recipe: PrecisionRecipe) -> list[Line]:
    """All linear layers of a model, in order of their first block; nothing is allocated.

    Raises: ConfigError if the recipe does not fit the model.
    """
    with torch.device("meta"):
        model = Hybrid(config, recipe)
    found: dict[tuple[str, tuple[int, int], int, LinearFormat], list[int]] = {}
    for _, layer, place in places(model):
        form = layer.number_format if isinstance(layer, Linear) else recipe.format(layer.role, place)
        high = layer.n_high(form) if isinstance(layer, Linear) else 0
        found.setdefault((layer.role, layer.shape, high, form), []).append(-1 if place is None else place.b)
    return [
        Line(role=role, shape=shape, high=high, form=form, blocks=tuple(b for b in blocks if b >= 0))
        for (role, shape, high, form), blocks in found.items()
    ]


def draw(report: Drawn, config: ModelConfig, recipe: PrecisionRecipe) -> list[Table | str]:
    """Tables of the layers and of their formats; the same as facts of the report."""
    rows, width = lines(config, recipe), recipe.compute.itemsize
    dtype = str(recipe.compute).removeprefix("torch.")
    forms = [form for form in dict.fromkeys(row.form for row in rows) if form != HIGH]
    letters = {form: chr(ord("A") + i) for i, form in enumerate(forms)} | {HIGH: "-"}
    layers = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("linear layer", "rows x columns", "blocks", "format", "bytes/weight"):
        layers.add_column(name, justify="right" if name in ("rows x columns", "bytes/weight") else "left")
    for row in rows:
        letter, each = letters[row.form], row.bytes_per_weight(width)
        where, size = ranges(row.blocks), f"{row.shape[0]} x {row.shape[1]}"
        name = f"{row.role} {size}" + f" blocks {where}" * bool(where)
        report.add(name, "; ".join(f"{p}: {_pair(pair)}" for p, pair in _products(row.form)))
        report.add(f"{name} bytes per weight", each, "bytes")
        high = f"; {row.high} rows {dtype}" if row.high else ""
        layers.add_row(row.role, size, where, Text(letter, "bold") + Text(high, "dim"), f"{each:.4g}")
    n_low = sum(row.shape[0] * row.shape[1] * max(1, len(row.blocks)) for row in rows if row.form != HIGH)
    share = n_low / config.cost().params
    report.add("weights in few bits", share, "of all")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("format", "product", "first operand", "second operand"):
        table.add_column(name)
    table.add_row(Text("-", "bold"), "all", dtype, dtype)
    for form in forms:
        for i, (product, pair) in enumerate(_products(form)):
            table.add_row(
                Text("" if i else letters[form], "bold"), product, *("-" if f is None else str(f) for f in pair)
            )
    switch = recipe.switch
    late = "" if switch is None else f"; after {switch.at:.0%} of the steps {switch.what} in {dtype}"
    return [layers, "", table, "", f"{count(n_low)} weights in few bits, {share:.0%} of the parameters{late}"]


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order as people write them: 0-3, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _products(form: LinearFormat) -> list[tuple[str, Pair]]:
    return list(zip(PRODUCTS, (form.fprop, form.dgrad, form.wgrad), strict=True))


def _pair(pair: Pair) -> str:
    return " with ".join("-" if form is None else str(form) for form in pair)
