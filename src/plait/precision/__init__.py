"""What numbers a matrix product computes in: formats, the linear layers, and the table of recipes."""

from plait.precision.int4 import INT4
from plait.precision.int8 import INT8
from plait.precision.plain import BF16, FP32
from plait.precision.recipe import PrecisionRecipe
from plait.precision.ternary import TERNARY

RECIPES: dict[str, PrecisionRecipe] = {"bf16": BF16, "fp32": FP32, "ternary": TERNARY, **INT8, **INT4}
