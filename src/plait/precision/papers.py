"""The recipes of the papers, each a literal: which format, scale, rounding and rotation for which operand.

In all of them embedding, head, norms, convolution, scan and attention's products stay in BF16, and masters, gradients
of weights and the optimiser in float32.
"""

from plait.precision.format import HIGH, LinearFormat, TensorFormat
from plait.precision.recipe import PrecisionRecipe, Rule

_E4M3 = TensorFormat(element="e4m3", scale="tensor")
_E5M2 = TensorFormat(element="e5m2", scale="tensor")

# Nemotron-H (NVIDIA 2025, arXiv:2504.03624 section 2.4): current scaling, one scale a tensor found as it is cast; E4M3
# for weights and activations, E5M2 for gradients; the first and last four products in BF16
TENSORWISE = LinearFormat(fprop=(_E4M3, _E4M3), dgrad=(_E5M2, _E4M3), wgrad=(_E5M2, _E4M3))
FP8 = PrecisionRecipe(name="fp8", rules=(Rule(first=4, last=4, format=HIGH), Rule(format=TENSORWISE)))

_LINE_128 = TensorFormat(element="e4m3", scale="block", block=(1, 128), scale_element="pow2")
_TILE_128 = TensorFormat(element="e4m3", scale="block", block=(128, 128), scale_element="pow2")

# Nemotron Nano 2 (NVIDIA 2025, arXiv:2508.14444 section 2.3), after DeepSeek-V3 (arXiv:2412.19437 section 3.3): E4M3
# for all, weights in tiles of 128 x 128, activations and gradients in lines of 128 along what is summed over, first and
# last four products in BF16. Scales are powers of two, TransformerEngine's default
TILEWISE = LinearFormat(fprop=(_LINE_128, _TILE_128), dgrad=(_LINE_128, _TILE_128), wgrad=(_LINE_128, _LINE_128))
FP8_BLOCK = PrecisionRecipe(name="fp8-block", rules=(Rule(first=4, last=4, format=HIGH), Rule(format=TILEWISE)))

_MX8 = TensorFormat(element="e4m3", scale="block", block=(1, 32), scale_element="e8m0")
_MX4 = TensorFormat(element="e2m1", scale="block", block=(1, 32), scale_element="e8m0")
_MX4_RANDOM = TensorFormat(
    element="e2m1", scale="block", block=(1, 32), scale_element="e8m0", hadamard=True, rounding="stochastic"
)
_MX4_TURNED = TensorFormat(element="e2m1", scale="block", block=(1, 32), scale_element="e8m0", hadamard=True)
_MX4_GRADIENT = TensorFormat(element="e2m1", scale="block", block=(1, 32), scale_element="e8m0", rounding="stochastic")

# OCP Microscaling 1.0 with the scales of NVIDIA 2025, arXiv:2506.08027: E4M3 for all operands, 32 under a power of two
# that is rounded up
MX8 = LinearFormat(fprop=(_MX8, _MX8), dgrad=(_MX8, _MX8), wgrad=(_MX8, _MX8))
MXFP8 = PrecisionRecipe(name="mxfp8", rules=(Rule(format=MX8),))

# the comparison of NVIDIA 2025, arXiv:2509.25149 section 5: the NVFP4 recipe with blocks of 32 under a power of two
MX4 = LinearFormat(fprop=(_MX4, _MX4), dgrad=(_MX4_GRADIENT, _MX4), wgrad=(_MX4_RANDOM, _MX4_TURNED))
MXFP4 = PrecisionRecipe(name="mxfp4", rules=(Rule(last=0.15, format=HIGH), Rule(format=MX4)))

_LINE = TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3")
_TILE = TensorFormat(element="e2m1", scale="block", block=(16, 16), scale_element="e4m3")
_GRADIENT = TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3", rounding="stochastic")
_TURNED = TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3", hadamard=True)
_TURNED_GRADIENT = TensorFormat(
    element="e2m1", scale="block", block=(1, 16), scale_element="e4m3", hadamard=True, rounding="stochastic"
)

# NVIDIA 2025, arXiv:2509.25149 section 4: weights in 16 x 16 blocks, the same numbers forward and backward; gradients
# rounded by chance; both operands of the weight gradient rotated; the last 15 % of the products in BF16
NV4 = LinearFormat(fprop=(_LINE, _TILE), dgrad=(_GRADIENT, _TILE), wgrad=(_TURNED_GRADIENT, _TURNED))
NVFP4 = PrecisionRecipe(name="nvfp4", rules=(Rule(last=0.15, format=HIGH), Rule(format=NV4)))

PAPERS = {recipe.name: recipe for recipe in (FP8, FP8_BLOCK, MXFP8, MXFP4, NVFP4)}
