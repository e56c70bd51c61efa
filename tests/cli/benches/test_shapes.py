"""What a token costs: against numbers worked out by hand, and against real tensors."""

from pathlib import Path

import pytest
import torch

from plait.cli.benches import shapes
from plait.config import ConfigError
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import build

TINY = ModelConfig.from_pattern(
    "M-*",
    vocab_size=100,
    d_model=8,
    mamba2={"n_heads": 4, "head_dim": 4, "d_state": 2, "n_groups": 2, "chunk": 4},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 2},
    mlp={"d_ff": 16},
)
# Mamba-2: in_proj 8 x (16 z + 16 x + 4 B + 4 C + 4 dt), out_proj 16 x 8; MLP 2 x 8 x 16; attention 8 x (8 + 4 + 4 + 8)
MATRICES = 8 * 44 + 128 + 256 + 192


def test_the_models_are_those_of_the_reference() -> None:
    millions = {name: round(config.cost().params / 1e6, 1) for name, config in shapes.MODELS.items()}
    assert millions == {"45m": 45.1, "290m": 291.2, "twin": 284.2, "2b4t": 2168.4}


def test_the_bitnet_is_the_published_one_but_for_its_vocabulary() -> None:
    config, preset = shapes.BITNET_2B, ModelConfig.preset("bitnet-2b4t")
    assert config.layers == preset.layers and config.d_model == preset.d_model
    # what llama.cpp runs in its place lacks the sub-norms of 30 blocks, nothing else
    assert config.cost().params - shapes.as_llama(config).cost().params == 30 * (2560 + 6912)
    assert shapes.as_llama(shapes.TWIN_284M) is shapes.TWIN_284M


def test_matrices_are_counted_by_hand() -> None:
    assert shapes.matrix_numbers(TINY) == MATRICES


@pytest.mark.parametrize("name", ["nemotron-h-8b", "llama-3.1-8b", "qwen2.5-7b", "nemotron-3-nano-30b-a3b"])
def test_matrices_are_nearly_all_that_one_token_meets(name: str) -> None:
    config = shapes.config_of(name)
    outside = 2 * config.vocab_size * config.d_model
    assert shapes.matrix_numbers(config) == pytest.approx(config.cost().active_params - outside, rel=2e-3)


def test_prefill_counts_the_head_once_and_visible_keys_only() -> None:
    # 3 tokens see 1 + 2 + 3 keys, each 4 FLOPs per number of 4 heads of 2
    assert shapes.prefill_flops(TINY, 3) == 2 * 3 * MATRICES + 2 * 800 + 6 * 4 * 8
    assert shapes.parameter_flops(TINY, 3) == 2 * 3 * (TINY.cost().params - 800)


def test_bytes_read_are_those_of_the_tensors() -> None:
    model = build(TINY, recipe="bf16").to(torch.bfloat16)
    assert shapes.weight_bytes(model) == 2 * (TINY.cost().params - 800)
    cache = model.cache(3)
    model(torch.zeros(3, 5, dtype=torch.int64), cache=cache)
    assert shapes.cache_bytes(TINY, 5, batch=3) == cache.n_bytes()


def test_a_tied_embedding_is_read_as_head() -> None:
    config = ModelConfig.from_dict(TINY.to_dict() | {"ties_embeddings": True})
    assert shapes.weight_bytes(build(config)) == 4 * config.cost().params


def test_models_are_found_by_name_preset_or_folder(tmp_path: Path) -> None:
    assert shapes.config_of("45m").name == "hybrid-45m"
    assert shapes.config_of("nemotron-h-8b").d_model == 4096
    save(build(TINY), tmp_path / "model", format="native")
    assert shapes.config_of(str(tmp_path / "model")).pattern == "M-*"
    with pytest.raises(ConfigError, match="did you mean '290m'"):
        shapes.config_of("29m")
