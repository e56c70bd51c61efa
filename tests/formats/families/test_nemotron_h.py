"""The four spellings of a nemotron_h config, and what in them decides."""

import json
import math
from pathlib import Path

import pytest
import torch

from plait.formats.error import CheckpointError
from plait.formats.families import nemotron_h
from plait.formats.families.fields import Fields
from plait.formats.hf import read_config, write_config
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE

SIZES: dict[str, object] = {
    "model_type": "nemotron_h",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 12,
    "layer_norm_epsilon": 1e-3,
}
PATTERN = {
    "hybrid_override_pattern": "M-*",
    "num_hidden_layers": 3,
    "attention_head_dim": 8,
    "n_groups": 3,
    "conv_kernel": 3,
    "chunk_size": 32,
    "time_step_limit": [0.0, math.inf],
    "torch_dtype": "bfloat16",
}
BLOCKS = {
    "layers_block_type": ["mamba", "mlp", "attention"],
    "head_dim": 8,
    "n_groups": 3,
    "conv_kernel": 3,
    "chunk_size": 32,
    "mtp_layers_block_type": ["attention", "moe"],
    "time_step_limit": [0.0, math.inf],
    "n_routed_experts": 8,
}
OLD = {
    "hybrid_override_pattern": "M-*",
    "num_hidden_layers": 3,
    "attention_head_dim": 8,
    "mamba_n_groups": 3,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 32,
    "mamba_expand": 2,
    "mamba_dt_limit": [0.0, math.inf],
    "mamba_conv_bias": True,
}
NATIVE = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    "head_dim": 8,
    "n_groups": 3,
    "conv_kernel": 3,
    "chunk_size": 32,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "dtype": "bfloat16",
}
WANTED = (
    Mamba2(n_heads=6, head_dim=8, d_state=12, n_groups=3, conv_width=3, chunk=32),
    MLP(d_ff=56),
    Attention(n_heads=4, n_kv_heads=2, head_dim=8),
)


def read(folder: Path, **fields: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(SIZES | fields))
    return read_config(folder)


@pytest.mark.parametrize("spelling", (PATTERN, BLOCKS, OLD, NATIVE), ids=("pattern", "blocks", "old", "native"))
def test_all_spellings_mean_the_same(spelling: dict[str, object], tmp_path: Path) -> None:
    config = read(tmp_path, **spelling)
    assert config.layers == WANTED
    assert config.norm_eps == 1e-3


def test_a_field_given_twice_counts_as_its_last(tmp_path: Path) -> None:
    text = json.dumps(SIZES | PATTERN)
    (tmp_path / "config.json").write_text(text[:-1] + ', "n_groups": 2}')
    (mamba, *_) = read_config(tmp_path).layers
    assert isinstance(mamba, Mamba2) and mamba.n_groups == 2


def test_null_key_value_heads_are_as_many_as_queries(tmp_path: Path) -> None:
    config = read(tmp_path, **PATTERN, num_key_value_heads=None)
    assert config.layers[2] == Attention(n_heads=4, n_kv_heads=4, head_dim=8)


def test_without_a_head_size_heads_share_the_width(tmp_path: Path) -> None:
    config = read(tmp_path, **{k: v for k, v in PATTERN.items() if k != "attention_head_dim"})
    assert config.layers[2] == Attention(n_heads=4, n_kv_heads=2, head_dim=6)


def test_finite_limits_are_kept_both_ways(tmp_path: Path) -> None:
    config = read(tmp_path, **PATTERN | {"time_step_limit": [0.01, 0.5]})
    assert isinstance(config.layers[0], Mamba2) and config.layers[0].dt_limit == (0.01, 0.5)
    assert write_config(config, torch.bfloat16)["time_step_limit"] == [0.01, 0.5]


def test_a_list_of_widths_counts_feed_forward_layers(tmp_path: Path) -> None:
    fields = PATTERN | {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4}
    config = read(tmp_path, **fields, **{"intermediate_size": [56, 32]})
    assert [spec.d_ff for spec in config.layers if isinstance(spec, MLP)] == [56, 32]
    config = read(tmp_path, **fields, **{"intermediate_size": [0, 56, 0, 32]})
    assert [spec.d_ff for spec in config.layers if isinstance(spec, MLP)] == [56, 32]
    with pytest.raises(CheckpointError, match="a list of 2 widths"):
        read(tmp_path, **fields, **{"intermediate_size": [56, 32, 8]})


def test_router_groups_are_not_the_groups_of_mamba(tmp_path: Path) -> None:
    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 20,
        "moe_latent_size": 12,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": False,
    }
    config = read(tmp_path, **PATTERN | {"hybrid_override_pattern": "ME*"}, **experts)
    assert config.layers[1] == MoE(
        n_experts=8,
        n_chosen=3,
        d_ff=16,
        d_shared=20,
        d_latent=12,
        n_groups=4,
        n_top_groups=2,
        scale=2.5,
        normalises=False,
    )
    written = write_config(config, torch.bfloat16)
    assert {key: written[key] for key in experts} == experts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hybrid_override_pattern": "M-X"}, "unknown layer letter 'X' at position 2"),
        ({"hybrid_override_pattern": "", "num_hidden_layers": None}, "pattern of layers is empty"),
        ({"hybrid_override_pattern": ["M"]}, "expected one letter per layer"),
        ({"num_hidden_layers": 4}, "num_hidden_layers = 4, but hybrid_override_pattern has 3 letters"),
        ({"layers_block_type": ["mamba", "conv"]}, r"layers_block_type\[1\] = 'conv' is unknown"),
        ({"layers_block_type": "mamba"}, "expected a list of words"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu' is not supported"),
        ({"sliding_window": 128}, "sliding_window = 128 is not supported"),
        ({"time_step_limit": [0.0]}, "expected a list of two numbers"),
        ({"time_step_limit": [0.0, "much"]}, "expected a list of two numbers"),
        ({"n_groups": 4}, "n_groups=4 does not divide n_heads=6"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, **PATTERN | fields)


def test_a_misspelled_field_is_named_though_its_default_does_not_fit(tmp_path: Path) -> None:
    fields = {("mamba_num_head" if k == "mamba_num_heads" else k): v for k, v in (SIZES | PATTERN).items()}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="unknown key 'mamba_num_head'; did you mean 'mamba_num_heads'"):
        read_config(tmp_path)


def test_neither_pattern_nor_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither hybrid_override_pattern nor layers_block_type"):
        read(tmp_path)


def test_several_shared_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="n_shared_experts = 2"):
        read(tmp_path, **PATTERN | {"hybrid_override_pattern": "MEM", "n_shared_experts": 2})


def test_what_we_write_is_the_spelling_that_every_reader_takes(tmp_path: Path) -> None:
    written = write_config(read(tmp_path, **NATIVE), torch.bfloat16)
    assert written["hybrid_override_pattern"] == "M-*" and written["num_hidden_layers"] == 3
    assert written["head_dim"] == written["attention_head_dim"] == 8
    assert not {"layers_block_type", "layer_types", "time_step_limit"} & written.keys()
    assert not [key for key in written if "expert" in key or "moe" in key]
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_a_right_field_of_absent_layers_is_not_taken_for_the_misspelt_one(tmp_path: Path) -> None:
    fields = {"n_group": 1, **{("n_grups" if k == "n_groups" else k): v for k, v in PATTERN.items()}}
    with pytest.raises(CheckpointError, match="unknown key 'n_grups'; did you mean 'n_groups'"):
        read(tmp_path, **fields)


def test_every_field_of_every_kind_of_layer_is_known() -> None:
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "moe_latent_size": 4}
    fields = Fields(SIZES | PATTERN | moe | {"moe_shared_expert_intermediate_size": 8}, Path("config.json"))
    nemotron_h._mamba2(fields)
    nemotron_h._attention(fields)
    nemotron_h._experts(fields)
    nemotron_h._widths(fields, "-")
    assert fields._asked.keys() - {"hidden_size"} == set(nemotron_h._OF_KINDS)
