"""Hugging Face folders: every published config survives the round trip, what we do not compute is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.formats.checkpoint import load, save
from plait.formats.error import CheckpointError
from plait.formats.hf import read_config, write_config
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.layers.mlp import MLP
from plait.model.presets import PRESETS


def _config(folder: Path, **fields: object) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"nemotron-t-8b"}))
def test_every_preset_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    config = ModelConfig.preset(name)
    back = _config(tmp_path / name, **write_config(config, torch.bfloat16))
    # mamba2's config has no field for the longest context
    context = {"max_context": config.max_context} if config.family == "mamba2" else {}
    assert replace(back, recipe=config.recipe, **context) == config
    assert back.recipe == ("ternary" if config.family == "bitnet" else "bf16")


def test_a_model_of_no_family_is_refused_with_the_way_out() -> None:
    with pytest.raises(CheckpointError, match="save as native"):
        write_config(ModelConfig.preset("nemotron-t-8b"), torch.bfloat16)


def test_the_reason_is_that_of_the_models_own_family() -> None:
    config = replace(ModelConfig.preset("nemotron-t-8b"), family="nemotron_h")
    with pytest.raises(CheckpointError, match="nemotron_h cannot express rotary positions; save as native"):
        write_config(config, torch.bfloat16)


def test_layers_of_different_sizes_are_refused(tiny: Hybrid) -> None:
    config = replace(tiny.config, layers=(*tiny.config.layers, MLP(d_ff=40)))
    with pytest.raises(CheckpointError, match="differ in size; save as native"):
        write_config(config, torch.bfloat16)


def test_ternary_weights_are_refused_outside_of_bitnet(tiny: Hybrid) -> None:
    with pytest.raises(CheckpointError, match="ternary"):
        write_config(replace(tiny.config, recipe="ternary"), torch.bfloat16)


def test_nothing_is_written_when_the_model_cannot_be_expressed(tmp_path: Path) -> None:
    config = ModelConfig.from_pattern(
        "*-", vocab_size=8, d_model=8, attention={"n_heads": 1, "n_kv_heads": 1, "rope": {}}, mlp={"d_ff": 8}
    )
    with pytest.raises(CheckpointError, match="save as native"):
        save(build(config), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not read; known: nemotron_h"),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantised by 'modelopt'"),
        ({"quantization_config": "fp8"}, "expected a table"),
        ({"vocab_size": "40"}, "vocab_size = '40', expected a whole number"),
        ({"vocab_size": 0}, "vocab_size = 0, expected a whole number of at least 1"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 1000"),
        ({"num_hidden_layers": 10**9}, "expected at most 10000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, expected a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "config.json: "),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small', expected a number"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3 does not divide"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1, expected true or false"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id = .* expected a token id"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_name(
    fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        _config(tmp_path, **LLAMA | fields)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"), [("num_atention_heads", "num_attention_heads"), ("hiden_size", "hidden_size")]
)
def test_a_misspelled_required_field_is_named(wrong: str, right: str, tmp_path: Path) -> None:
    fields: dict[str, object] = dict(LLAMA)
    fields[wrong] = fields.pop(right)
    with pytest.raises(CheckpointError, match=f"{right} is missing.*{wrong!r}"):
        _config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rope_tetha", "rope_theta"),
        ("head_dims", "head_dim"),
        ("rms_norm_epsi", "rms_norm_eps"),
        ("tie_word_embedding", "tie_word_embeddings"),
        ("num_key_value_head", "num_key_value_heads"),
    ],
)
def test_a_misspelled_optional_field_is_named(wrong: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"unknown key {wrong!r}; did you mean {right!r}"):
        _config(tmp_path, **LLAMA | {wrong: 8})


def test_fields_of_other_programs_are_no_misspellings(tmp_path: Path) -> None:
    plain = _config(tmp_path, **LLAMA)
    others = {"use_cache": True, "pretraining_tp": 1, "attention_dropout": 0.0, "transformers_version": "5"}
    assert _config(tmp_path, **LLAMA, **others) == plain


def test_stops_of_the_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert _config(tmp_path, **LLAMA, eos_token_id=3).eos_ids == (3, 7)


def test_unreadable_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_config(tmp_path)


def test_a_tied_nemotron_stores_its_head_for_readers_that_do_not_tie(tiny: Hybrid, tmp_path: Path) -> None:
    model = build(replace(tiny.config, ties_embeddings=True), recipe="fp32")
    save(model, tmp_path / "x")
    from safetensors.torch import load_file, save_file

    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])
    assert torch.equal(load(tmp_path / "x", device="cpu").embed.weight, model.embed.weight)
    save_file(stored | {"lm_head.weight": stored["lm_head.weight"] + 1}, tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but lm_head.weight is not the embedding"):
        load(tmp_path / "x")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tiny: Hybrid, tmp_path: Path) -> None:
    save(tiny, tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 51}))
    with pytest.raises(CheckpointError, match=r"embeddings.weight' has shape \(50, 16\), .* \(51, 16\); look at vocab"):
        load(tmp_path / "x")


def test_the_licence_of_the_card_is_kept(tiny: Hybrid, tmp_path: Path) -> None:
    from plait.formats.checkpoint import Checkpoint

    save(tiny, tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# card\nlicense: wrong\n")
    assert Checkpoint.open(tmp_path / "x").provenance["licence"] == "apache-2.0"


@pytest.mark.parametrize("case", ("modelopt_fp8", "modelopt_nvfp4"))
def test_packed_weights_are_refused_with_a_word_on_what_to_take(case: str, shared: Path) -> None:
    with pytest.raises(CheckpointError, match="not read yet; *take the checkpoint"):
        load(shared / "parity" / case)
