"""Small models of three kinds, and a small tokenizer, for the engine's tests."""

from collections.abc import Callable

import pytest

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over the lazy dog; ein süßer Bär läuft über die Straße. 你好，世界 🦊🐻 " * 3


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([WORDS], 340)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Hybrid]:
    """A model from a pattern, in float32, with 384 ids."""

    def make(pattern: str = "M-M*-M", seed: int = 0, **changes: object) -> Hybrid:
        sizes: dict[str, object] = {
            "vocab_size": 384,
            "d_model": 32,
            "init_std": 0.3,  # wide enough that likeliest tokens lie well apart
            "mamba2": {"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
            "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
            "mlp": {"d_ff": 64},
        }
        return build(ModelConfig.from_pattern(pattern, **(sizes | changes)), recipe="fp32", seed=seed)

    return make
