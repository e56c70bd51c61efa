"""Bytes of weights: against the engine's own layers, and against sums by hand."""

import pytest
import torch

from plait.compress.numbers import CODES, Numbers, format_of, layer_weights, rest_weights
from plait.config import ConfigError
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of

SIZES = {
    "vocab_size": 512,
    "d_model": 256,
    "mamba2": {"n_heads": 16, "head_dim": 32, "d_state": 32, "n_groups": 4},
    "attention": {"n_heads": 8, "n_kv_heads": 2, "head_dim": 32},
    "mlp": {"d_ff": 512},
    "moe": {"n_experts": 8, "n_chosen": 2, "d_ff": 96, "d_shared": 128},
}
UNTIED = ModelConfig.from_pattern("M-*E", **SIZES)
TIED = ModelConfig.from_pattern("M-*E", ties_embeddings=True, **SIZES)


def _sum(config: ModelConfig, weights: str | float, field: str = "stored") -> float:
    parts = [layer_weights(spec, config.d_model, weights) for spec in config.layers]
    return sum(getattr(part, field) for part in [*parts, rest_weights(config, weights)])


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("weights", ["bf16", *CODES])
def test_bytes_are_those_that_a_model_of_this_recipe_holds(config: ModelConfig, weights: str) -> None:
    recipe = recipe_of(weights)
    with torch.device("meta"):
        model = Hybrid(config, recipe)
    held = 0
    for name, t in model.state_dict().items():
        # empty modules are float32 until they are filled
        if t.dtype != torch.float32 or name.endswith((".A_log", ".D", ".dt_bias", ".correction", ".scales")):
            held += t.nbytes
        else:
            held += 2 * t.numel()
    if config.ties_embeddings and model.head is None:
        assert "head.weight" not in model.state_dict()
    assert _sum(config, weights) == held


def test_bits_count_every_number() -> None:
    n = UNTIED.cost().params
    assert _sum(UNTIED, 4) == n / 2
    assert _sum(UNTIED, "4.5 bit") == n * 4.5 / 8
    assert _sum(TIED, 16) == TIED.cost().params * 2


def test_a_named_format_is_of_matrices_and_leaves_the_rest_high() -> None:
    # by hand: matrices of "M-*E", experts included
    mamba = 256 * (2 * 512 + 2 * 128 + 16) + 512 * 256
    matrices = mamba + 2 * 256 * 512 + 2 * 256 * (256 + 64) + 2 * 8 * 96 * 256 + 2 * 128 * 256
    assert _sum(UNTIED, "bf16") - _sum(UNTIED, "fp8") == matrices
    assert _sum(UNTIED, "bf16") - _sum(UNTIED, "nvfp4") == matrices * (16 - 4.5) / 8
    # A_log, D and dt_bias of 16 heads and the correction of 8 experts are float32 already
    assert _sum(UNTIED, "fp32") == 2 * _sum(UNTIED, "bf16") - 4 * (3 * 16 + 8)


def test_a_step_reads_one_row_of_the_embedding_and_the_experts_it_chooses() -> None:
    unread = 2 * 511 * 256 + 2 * (8 - 2) * 2 * 96 * 256
    assert _sum(UNTIED, "bf16") - _sum(UNTIED, "bf16", "read") == unread
    assert _sum(TIED, "bf16") - _sum(TIED, "bf16", "read") == unread - 2 * 511 * 256
    # the embedding stays high, experts do not
    experts = (8 - 2) * 2 * 96 * 256 * 4.5 / 8
    assert _sum(UNTIED, "nvfp4") - _sum(UNTIED, "nvfp4", "read") == 2 * 511 * 256 + experts


@pytest.mark.parametrize(("text", "bits"), [("4", 4.0), ("4bit", 4.0), ("4.5 bit", 4.5), (3.5, 3.5), ("16-bits", 16.0)])
def test_bits_are_read_in_any_spelling(text: str | float, bits: float) -> None:
    assert format_of(text) == bits


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": "nvpf4"}, r"weights='nvpf4' is no number format; did you mean 'nvfp4'"),
        ({"weights": "int4-33"}, r"did you mean 'int4-3?2"),
        ({"weights": 0}, r"weights=0 is no number format"),
        ({"weights": "4.5.1 bit"}, "is no number format"),
        ({"kv": "int9"}, r"kv='int9' is no number format; did you mean 'int[48]'"),
        ({"ssm": "huge"}, r"ssm='huge' is no number format; known: fp32, bf16"),
        ({"conv": 65}, "conv=65"),
    ],
    ids=str,
)
def test_an_unknown_format_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Numbers(**fields)
