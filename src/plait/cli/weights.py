"""How many bytes a model's weights take, and how many of them one decoded token reads.

stored = parameters x bytes of the compute dtype - what codes save
read   = the same of active parameters, and of an embedding that is not the head a single row
"""

from dataclasses import dataclass

import torch

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.precision.linear import Linear
from plait.precision.weight_only import WeightOnlyLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """stored, read: bytes. high: names of matrices that a recipe of codes leaves as they are."""

    stored: int
    read: int
    high: tuple[str, ...] = ()


def weights(config: ModelConfig, recipe: str) -> Weights:
    """Count the bytes of a model's weights in the numbers of a recipe; nothing is allocated.

    Raises: ConfigError for an unknown recipe.
    """
    cost, chosen = config.cost(), recipe_of(recipe)
    width = chosen.compute.itemsize
    stored = cost.params * width
    unread = 0 if config.ties_embeddings else (config.vocab_size - 1) * config.d_model * width
    read = cost.active_params * width - unread
    if not chosen.weight_only:
        return Weights(stored=stored, read=read)
    with torch.device("meta"):
        model = Hybrid(config, chosen)
    saved, high = 0, []
    for name, layer in model.named_modules():
        if isinstance(layer, WeightOnlyLinear):
            parts = [t for t in (layer.codes, layer.scales, layer.zeros) if t is not None]
            saved += layer.codes.numel() * 8 // layer.bits * width - sum(t.nbytes for t in parts)
        elif isinstance(layer, Linear):
            high.append(name)
    return Weights(stored=stored - saved, read=read - saved, high=tuple(high))
