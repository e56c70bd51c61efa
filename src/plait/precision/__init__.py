"""What numbers a matrix product computes in: formats, the linear layer, and the table of recipes."""

from plait.precision.plain import BF16, FP32
from plait.precision.ternary import TERNARY

RECIPES = {"bf16": BF16, "fp32": FP32, "ternary": TERNARY}
