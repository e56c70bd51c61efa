"""The plain recipes: every product in one dtype, over float32 masters when training."""

import torch

from plait.precision.recipe import PrecisionRecipe

BF16 = PrecisionRecipe(name="bf16", compute=torch.bfloat16)
FP32 = PrecisionRecipe(name="fp32", compute=torch.float32)
