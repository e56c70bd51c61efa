"""How many bytes a model's weights take, and how many of them one decoded token reads.

stored = parameters x bytes of the compute dtype - what codes save
read   = the same of active parameters, and of an embedding that is not the head a single row
"""

from dataclasses import dataclass

import torch

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.precision.linear import Linear
from plait.precision.recipe import PrecisionRecipe
from plait.precision.weight_only import WeightOnlyLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """stored, read: bytes. high: names of matrices that a recipe of codes leaves as they are."""

    stored: int
    read: int
    high: tuple[str, ...] = ()


def weights(config: ModelConfig, recipe: str | PrecisionRecipe) -> Weights:
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
    stored_saved, read_saved, high = 0, 0, []
    for name, layer in model.named_modules():
        if isinstance(layer, WeightOnlyLinear):
            parts = [t for t in (layer.codes, layer.scales, layer.zeros) if t is not None]
            n_bytes = sum(t.nbytes for t in parts)
            d_out, d_in = layer.shape
            # rows of a ternary layer that stay high save nothing
            before = (layer.codes.shape[0] if layer.bits == 2 else d_out) * d_in * width
            read_saved += before - n_bytes
            # the copy of a tied head is read in place of the embedding, and stored beside it
            stored_saved += (0 if name == "head" and config.ties_embeddings else before) - n_bytes
        elif isinstance(layer, Linear):
            high.append(name)
    return Weights(stored=stored - stored_saved, read=read - read_saved, high=tuple(high))
