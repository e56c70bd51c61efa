"""Configs of llama, qwen2, qwen3 and bitnet: heads, biases, windows, and what each cannot say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from plait.formats.error import CheckpointError
from plait.formats.families.llama import LLAMA, QWEN2, QWEN3
from plait.formats.hf import read_config
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mlp import MLP

SIZES: dict[str, object] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def read(folder: Path, kind: str, **fields: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": kind} | SIZES | fields))
    return read_config(folder)


def attention(config: ModelConfig) -> Attention:
    (first, *_) = config.layers
    assert isinstance(first, Attention)
    return first


def test_a_block_is_two_layers(tmp_path: Path) -> None:
    config = read(tmp_path, "llama")
    assert config.pattern == "*-*-"
    assert config.layers[1] == MLP(d_ff=24, activation="silu", gated=True)


@pytest.mark.parametrize(("kind", "head_dim"), [("llama", 16), ("qwen2", 16), ("qwen3", 128), ("bitnet", 16)])
def test_head_sizes_follow_the_family_unless_given(kind: str, head_dim: int, tmp_path: Path) -> None:
    assert attention(read(tmp_path, kind)).head_dim == head_dim
    assert attention(read(tmp_path, kind, head_dim=32)).head_dim == 32
    assert attention(read(tmp_path, kind, head_dim=None)).head_dim == head_dim


def test_null_key_value_heads_are_as_many_as_queries(tmp_path: Path) -> None:
    assert attention(read(tmp_path, "llama", num_key_value_heads=None)).n_kv_heads == 4


@pytest.mark.parametrize(
    ("kind", "flag", "biases"),
    [
        ("llama", False, (False, False)),
        ("llama", True, (True, True)),
        ("qwen2", False, (True, False)),
        ("qwen3", True, (True, True)),
    ],
)
def test_biases_follow_family_and_flag(kind: str, flag: bool, biases: tuple[bool, bool], tmp_path: Path) -> None:
    found = attention(read(tmp_path, kind, attention_bias=flag))
    assert (found.qkv_bias, found.out_bias) == biases


def test_bitnet_is_gated_squared_relu_with_norms_in_ternary(tmp_path: Path) -> None:
    quantised = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    config = read(tmp_path, "bitnet", hidden_act="relu2", quantization_config=quantised)
    assert config.recipe == "ternary"
    assert attention(config).sub_norm
    assert config.layers[1] == MLP(d_ff=24, activation="relu2", gated=True, sub_norm=True)
    assert attention(config).rope is not None and attention(config).rope.base == 500000.0


@pytest.mark.parametrize("words", [{}, {"linear_class": "bitlinear"}, {"quantization_mode": "offline"}])
def test_bitnet_is_packed_unless_it_says_online(words: dict[str, str], tmp_path: Path) -> None:
    assert read(tmp_path, "bitnet", quantization_config={"quant_method": "bitnet"} | words).recipe == "ternary-packed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"linear_class": "bitlinear", "quantization_mode": "online"}, "linear_class = 'bitlinear' .* not supported"),
        ({"quantization_mode": "online"}, "linear_class = None .* not supported"),
        ({"linear_class": "trilinear"}, "linear_class = 'trilinear' is not supported"),
        ({"quantization_mode": "later"}, "quantization_mode = 'later' is not supported"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_other_kinds_of_bitnet_are_refused(words: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "bitnet", quantization_config={"quant_method": "bitnet"} | words)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_windows_in_use_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="sliding-window attention is in use"):
        read(tmp_path, "qwen2", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 28},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_windows_that_are_not_used_are_fine(fields: dict[str, object], tmp_path: Path) -> None:
    assert read(tmp_path, "qwen2", **fields) == read(tmp_path, "qwen2")


def _with(config: ModelConfig, **changes: object) -> ModelConfig:
    layers = tuple(replace(s, **changes) if isinstance(s, Attention) else s for s in config.layers)  # type: ignore[arg-type]
    return replace(config, layers=layers)


def test_each_family_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    llama, qwen2, qwen3 = (read(tmp_path, kind) for kind in ("llama", "qwen2", "qwen3"))
    with pytest.raises(CheckpointError, match="llama cannot express qk_norm=True"):
        LLAMA.write(qwen3)
    with pytest.raises(CheckpointError, match="llama cannot express qkv_bias=True with out_bias=False"):
        LLAMA.write(qwen2)
    with pytest.raises(CheckpointError, match="qwen3 cannot express qk_norm=False"):
        QWEN3.write(llama)
    with pytest.raises(CheckpointError, match="qwen2 cannot express qkv_bias=False"):
        QWEN2.write(llama)
    with pytest.raises(CheckpointError, match="qwen2 cannot express head_dim=8"):
        QWEN2.write(_with(qwen2, head_dim=8))
    with pytest.raises(CheckpointError, match="without rotary positions"):
        LLAMA.write(_with(llama, rope=None))
    with pytest.raises(CheckpointError, match="the pattern"):
        LLAMA.write(replace(llama, layers=llama.layers[:1]))
    with pytest.raises(CheckpointError, match="llama cannot express an ungated feed-forward layer"):
        LLAMA.write(replace(llama, layers=(llama.layers[0], MLP(d_ff=24))))


def test_old_and_new_readers_find_their_rope(tmp_path: Path) -> None:
    written = LLAMA.write(ModelConfig.preset("llama-3.1-8b"))
    assert written["rope_theta"] == 500000.0
    table = written["rope_parameters"]
    assert isinstance(table, dict) and table["rope_theta"] == 500000.0
    assert written["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
