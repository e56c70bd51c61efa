"""What numbers a matrix product computes in: formats, the linear layers, and the table of recipes."""

from plait.precision import fp8 as fp8
from plait.precision import fp8_block as fp8_block
from plait.precision import int4 as int4
from plait.precision import int8 as int8
from plait.precision import mxfp4 as mxfp4
from plait.precision import mxfp8 as mxfp8
from plait.precision import nvfp4 as nvfp4
from plait.precision import ternary as ternary
from plait.precision.int4 import INT4
from plait.precision.int8 import INT8
from plait.precision.papers import PAPERS
from plait.precision.plain import BF16, FP32
from plait.precision.recipe import PrecisionRecipe
from plait.precision.ternary import TERNARY, TERNARY_PACKED

RECIPES: dict[str, PrecisionRecipe] = {
    **{"bf16": BF16, "fp32": FP32, **PAPERS, "ternary": TERNARY},
    **INT8,
    **INT4,
    **TERNARY_PACKED,
}
