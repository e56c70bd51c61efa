"""The same model in transformers, with the very same weights: written by our own export and read by theirs."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.formats.checkpoint import save
from plait.model.hybrid import Hybrid


def transformers_model(model: Hybrid, dtype: torch.dtype | None = None) -> nn.Module:
    """The library's model with our weights.

    Args:
        model: whose weights to take.
        dtype: of its parameters and products; None for our compute dtype.

    Raises: ValueError if transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("--against transformers: it is not installed; pip install transformers") from None
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "hf", format="hf")
        # no progress bars of theirs between our lines
        transformers.utils.logging.disable_progress_bar()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or model.recipe.compute)
    for module in theirs.modules():
        # it clamps dt to time_step_min instead of the config's limit; without this the outputs differ
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # type: ignore[assignment]
    return theirs.eval()


class Continued:
    """Their model in the middle of sequences, with their own cache."""

    def __init__(self, theirs: nn.Module, ids: Tensor) -> None:
        """Args: theirs: from `transformers_model`. ids: (B, L) int64, the beginning of each sequence."""
        self.model = theirs
        out = theirs(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]

    def step(self, ids: Tensor) -> Tensor:
        """Feed (B, 1) ids; returns (B, V) logits."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def deepen(self, depth: int, seed: int = 0) -> None:
        """Let every attention layer remember `depth` tokens, of random keys and values."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.cache.layers:
            keys = getattr(layer, "keys", None)
            if keys is not None and keys.numel():
                B, K, _, P = keys.shape
                layer.keys = torch.randn(B, K, depth, P, generator=generator).to(keys)
                layer.values = torch.randn(B, K, depth, P, generator=generator).to(keys)
