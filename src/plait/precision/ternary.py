"""BitNet b1.58: ternary weights and int8 activations in every linear layer of the blocks.

Weights are rounded from their masters at every forward, one scale per matrix; activations one scale per token;
gradients go straight through to the masters. Embedding and head stay high.

Source   Ma et al. 2025, arXiv:2504.12285 section 2.
"""

import torch
from torch import Tensor

from plait.ops.quant import quantize_ternary
from plait.precision.format import HIGH, LinearFormat, TensorFormat
from plait.precision.recipe import PrecisionRecipe, Rule

BITLINEAR = LinearFormat(
    input=TensorFormat(element="int8", scale="row"), weight=TensorFormat(element="ternary", scale="tensor")
)
TERNARY = PrecisionRecipe(
    name="ternary",
    compute=torch.bfloat16,
    rules=(Rule(role="head", format=HIGH), Rule(role="*", format=BITLINEAR)),
)


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to {-1, 0, 1} times its mean magnitude.

    Args:
        w: any shape, any float dtype.

    Returns: codes int8 in w's shape, and descale () float32.
    """
    return quantize_ternary(w)


def dequantize(codes: Tensor, descale: Tensor) -> Tensor:
    """The float32 weights that codes and descale stand for, in codes' shape."""
    return codes * descale
