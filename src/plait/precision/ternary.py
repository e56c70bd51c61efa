"""BitNet b1.58: ternary weights and int8 activations in every linear layer of the blocks.

Weights are rounded from their masters at every forward, one scale per matrix, or per segment of a fused one (z, x, B
and C of Mamba-2's input projection; its dt rows stay high); activations one scale per token; gradients go straight
through to the masters. Embedding and head stay high. The mean of a weight that is sharded over devices is that of all
of it: under FSDP a layer sees its whole weight, and the mean of a DTensor is over all shards.

Source   Ma et al. 2025, arXiv:2504.12285 section 2.
"""

from typing import NamedTuple

from torch import Tensor

from plait.ops.quant import quantize_ternary
from plait.precision.format import LinearFormat, TensorFormat
from plait.precision.int8 import INT8
from plait.precision.recipe import PrecisionRecipe, Rule

_TOKENS = TensorFormat(element="int8", scale="token")
_SEGMENTS = TensorFormat(element="ternary", scale="segment")
# the gradients' products see the same rounded numbers: rounding counts as the identity in the backward pass
BITLINEAR = LinearFormat(fprop=(_TOKENS, _SEGMENTS), dgrad=(None, _SEGMENTS), wgrad=(None, _TOKENS), high=("dt",))
TERNARY = PrecisionRecipe(name="ternary", rules=(Rule(format=BITLINEAR),))

# the same for inference: codes without masters, two bits a weight; with int8 in the name the head is held in int8, as a
# copy where it is tied to the embedding, which stays
_PACKED = LinearFormat(fprop=(_TOKENS, TensorFormat(element="ternary", scale="row")), high=("dt",))
_HEAD = Rule(role="head", format=INT8["int8"].format("head"))
TERNARY_PACKED = {
    "ternary-packed": PrecisionRecipe(name="ternary-packed", rules=(Rule(format=_PACKED),)),
    "ternary-packed-int8": PrecisionRecipe(
        name="ternary-packed-int8", rules=(_HEAD, Rule(format=_PACKED)), copies_head=True
    ),
}


class Ternary(NamedTuple):
    """codes: int8 -1, 0 or 1; descale: () float32, so that w ~ codes * descale."""

    codes: Tensor
    descale: Tensor


def quantize(w: Tensor) -> Ternary:
    """Round a weight matrix to {-1, 0, 1} times its mean magnitude.

    Args:
        w: any shape, any float dtype.

    Returns: codes int8 in w's shape, and descale () float32.
    """
    return Ternary(*quantize_ternary(w))


def dequantize(codes: Tensor, descale: Tensor) -> Tensor:
    """The float32 weights that codes and descale stand for, in codes' shape."""
    return codes * descale
