"""Weights as int8 codes, for inference: half of bfloat16's bytes, and hardly any error.

"int8" has groups of 128 (8.125 bits a weight); "int8-32", "int8-64" and "int8-128" name the group, and "-zero" after
them gives each group a zero point. The head is int8 too where it is a matrix of its own. Measured on normal weights,
the error of a weight is 0.5 to 0.7 % of its size (root mean square) whatever the group, so the fewest bytes win.
"""

from typing import NamedTuple

from torch import Tensor

from plait.ops.quant import dequantize_groups, quantize_groups
from plait.precision.format import LinearFormat, TensorFormat
from plait.precision.recipe import PrecisionRecipe, Rule


class Grouped(NamedTuple):
    """codes: int8, or packed int4; scales: float16, one a group; zeros: uint8 zero points, one a group, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def _recipe(name: str, group: int, zeros: bool = False) -> PrecisionRecipe:
    weight = TensorFormat(element="int8", scale="group", group=group, zeros=zeros)
    form = LinearFormat(fprop=(None, weight))
    return PrecisionRecipe(name=name, rules=(Rule(role="head", format=form), Rule(format=form)))


INT8 = {"int8": _recipe("int8", 128)}
INT8 |= {f"int8-{group}": _recipe(f"int8-{group}", group) for group in (32, 64, 128)}
INT8 |= {f"int8-{group}-zero": _recipe(f"int8-{group}-zero", group, True) for group in (32, 64, 128)}


def quantize(w: Tensor, group: int = 128, zeros: bool = False) -> Grouped:
    """Round a weight matrix to int8 codes; arguments, result and errors are those of `ops.quant.quantize_groups`."""
    return Grouped(*quantize_groups(w, 8, group, zeros))


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The float32 weights that codes, scales and zero points stand for."""
    return dequantize_groups(codes, scales, zeros, bits=8)
