"""Weights as int4 codes, for inference: little more than a quarter of bfloat16's bytes.

"int4" has groups of 64 (4.25 bits a weight); "int4-32", "int4-64" and "int4-128" name the group, and "-zero" after
them gives each group a zero point. The head, where it is a matrix of its own, is int8: its errors go straight into the
logits.
"""

from torch import Tensor

from plait.ops.quant import dequantize_groups, quantize_groups
from plait.precision.format import LinearFormat, TensorFormat
from plait.precision.int8 import INT8, Grouped
from plait.precision.recipe import PrecisionRecipe, Rule

_HEAD = Rule(role="head", format=INT8["int8"].format("head"))


def _recipe(name: str, group: int, zeros: bool = False) -> PrecisionRecipe:
    weight = TensorFormat(element="int4", scale="group", group=group, zeros=zeros)
    return PrecisionRecipe(name=name, rules=(_HEAD, Rule(format=LinearFormat(fprop=(None, weight)))))


INT4 = {"int4": _recipe("int4", 64)}
INT4 |= {f"int4-{group}": _recipe(f"int4-{group}", group) for group in (32, 64, 128)}
INT4 |= {f"int4-{group}-zero": _recipe(f"int4-{group}-zero", group, True) for group in (32, 64, 128)}


def quantize(w: Tensor, group: int = 64, zeros: bool = False) -> Grouped:
    """Round a weight matrix to int4 codes; arguments, result and errors are those of `ops.quant.quantize_groups`."""
    return Grouped(*quantize_groups(w, 4, group, zeros))


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The float32 weights that packed codes, scales and zero points stand for."""
    return dequantize_groups(codes, scales, zeros, bits=4)
