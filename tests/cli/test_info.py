"""`plait info`: published numbers to the printed digit, without allocating anything."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from plait.cli.drawing import count, size
from plait.cli.info import Inputs, run, sizes, tokens_of, transformer_like
from plait.cli.launch import launch
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build, recipe_of
from plait.model.presets import PRESETS

PUBLISHED = [
    ("nemotron-h-4b", "4.489 B", 16384, 84),
    ("nemotron-h-8b", "8.101 B", 16384, 96),
    ("nemotron-h-47b", "46.79 B", 20480, 720),
    ("nemotron-h-56b", "56.32 B", 40960, 864),
    ("nemotron-nano-12b-v2", "12.31 B", 24576, 140),
    ("nemotron-nano-9b-v2", "8.888 B", 16384, 135),
]


@pytest.mark.parametrize(("name", "params", "kv_bytes", "state_mib"), PUBLISHED)
def test_published_sizes_are_met_to_the_printed_digit(name: str, params: str, kv_bytes: int, state_mib: int) -> None:
    s = sizes(ModelConfig.preset(name), 8192, 1)
    assert count(s.params) == params
    assert s.kv_bytes_per_token == kv_bytes
    assert s.ssm_bytes == state_mib * 2**20
    drawing = run(Inputs(model=name)).table()
    assert f"{params} " in drawing and f"{kv_bytes:,} bytes" in drawing and f"{state_mib} MiB" in drawing


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Hybrid(config, recipe_of("bf16"))
    stored = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert sizes(config, 1, 1).params == stored


def test_cache_bytes_are_those_of_a_real_cache() -> None:
    config = ModelConfig.preset("nemotron-h-4b")
    small = dataclasses.replace(config, vocab_size=64, d_model=64)
    from plait.model.cache import Cache

    cache = Cache(small, 2, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert cache.n_bytes() == sizes(small, 0, 2).cache_bytes


def test_cost_grows_with_context_and_batch_by_arithmetic() -> None:
    config = ModelConfig.preset("nemotron-h-8b")
    one, many = sizes(config, 8192, 1), sizes(config, 16384, 3)
    assert many.cache_bytes == 3 * (one.cache_bytes + 8192 * one.kv_bytes_per_token)
    assert sizes(config, 8192, 1, "fp32").kv_bytes_per_token == 2 * one.kv_bytes_per_token


def test_the_transformer_of_the_same_width_has_attention_in_every_other_layer() -> None:
    other = transformer_like(ModelConfig.preset("nemotron-h-8b"))
    assert other is not None and other.pattern == "*" * 26
    assert transformer_like(ModelConfig.preset("llama-3.1-8b")) is None


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int4-32-zero"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_weights_are_those_of_a_real_model(recipe: str, tied: bool) -> None:
    """All but the float32 of the few sensitive parameters, which counts as the rest; a token reads no embedding."""
    config = dataclasses.replace(ModelConfig.preset("nemotron-h-4b"), vocab_size=640, d_model=256, ties_embeddings=tied)
    config = dataclasses.replace(config, layers=tuple(config.layers[i] for i in (0, 1, 7)))
    model = Hybrid(config, recipe_of(recipe)) if recipe == "bf16" else build(config, recipe)
    coded = (".codes", ".scales", ".zeros")
    held = sum(t.nbytes if n.endswith(coded) else 2 * t.numel() for n, t in model.state_dict().items())
    s = sizes(config, 100, 1, recipe)
    assert s.weight_bytes == held
    assert s.decode_weight_bytes == held - (0 if tied else 639 * 256 * 2)
    assert s.decode_cache_bytes == s.cache_bytes and s.bits_per_parameter == held * 8 / s.params


def test_info_says_what_stays_high() -> None:
    drawing = run(Inputs(model="nemotron-h-8b", recipe="int4")).table()
    assert "INT4, 5.29 bits per parameter; embedding in bfloat16" in drawing
    assert "4.207 GiB" in drawing and "per token: weights 3.987 GiB, the rest cache" in drawing
    assert "decode reads" in run(Inputs(model="nemotron-h-8b")).table()
    experts = next(name for name in PRESETS if "E" in ModelConfig.preset(name).pattern)
    assert "embedding, experts" in run(Inputs(model=experts, recipe="int8")).table()


def test_info_names_matrices_whose_rows_no_group_divides(tmp_path: Path) -> None:
    config = dataclasses.replace(ModelConfig.preset("nemotron-h-4b"), vocab_size=64, d_model=96)
    save(build(dataclasses.replace(config, layers=config.layers[:2])), tmp_path / "model", format="native")
    drawing = " ".join(run(Inputs(model=str(tmp_path / "model"), recipe="int8")).table().split())
    assert "3 matrices whose rows no group divides (blocks.0.mixer.in_proj, ...)" in drawing


def test_the_drawing_shows_pattern_and_attention_layers() -> None:
    drawing = run(Inputs(model="nemotron-h-8b", context="128k", batch=4)).table()
    assert "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-" in drawing
    assert "layers 7, 18, 29, 40" in drawing and "4 sequences of 131,072 tokens" in drawing
    assert "\x1b" not in drawing


def test_all_presets_are_listed() -> None:
    drawing = run(Inputs(presets=True)).table()
    assert all(name in drawing for name in PRESETS)


@pytest.mark.parametrize(("n", "shown"), [(8_101_000_000, "8.101 B"), (999_999_999, "1.000 B"), (45, "45"), (0, "0")])
def test_counts_have_four_digits(n: int, shown: str) -> None:
    assert count(n) == shown


@pytest.mark.parametrize(("n", "shown"), [(96 * 2**20, "96 MiB"), (3 * 2**29, "1.500 GiB"), (7, "7 bytes")])
def test_sizes_are_in_binary_units(n: int, shown: str) -> None:
    assert size(n) == shown


def test_contexts_are_read_as_people_write_them() -> None:
    assert [tokens_of(text) for text in ("4096", "128k", "1M")] == [4096, 131072, 1048576]
    for wrong in ("", "k", "-1", "0", "8kk"):
        with pytest.raises(ValueError, match="context"):
            tokens_of(wrong)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["info", "nemotron-h-8"], "did you mean nemotron-h-8b"),
        (["info"], "nemotron-h-8b"),
        (["info", "nemotron-h-8b", "--recipe", "bf17"], "bf16"),
        (["info", "nemotron-h-8b", "--batch", "0"], "batch=0"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_hint(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(words) == 2
    assert hint in capsys.readouterr().err


def test_json_holds_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["info", "nemotron-h-8b", "--json"]) == 0
    facts = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out.splitlines()[-1])["facts"]}
    assert facts["ssm bytes"] == 96 * 2**20 and facts["kv bytes per token"] == 16384


def test_the_cache_is_sized_for_the_models_own_context(tmp_path: Path) -> None:
    config = dataclasses.replace(ModelConfig.preset("nemotron-h-4b"), vocab_size=64, d_model=64, max_context=256)
    config = dataclasses.replace(config, layers=config.layers[:9])
    save(build(config), tmp_path / "model", format="native")
    facts = {fact.name: fact.value for fact in run(Inputs(model=str(tmp_path / "model"))).facts}
    assert facts["context"] == 256 and facts["cache bytes"] == sizes(config, 256, 1).cache_bytes
    listed = {fact.name: fact.value for fact in run(Inputs(presets=True)).facts}
    assert listed["mamba2-2.7b context"] == 2048 and listed["llama-3.1-8b context"] == 131072
    asked = {fact.name: fact.value for fact in run(Inputs(model="mamba2-2.7b", context="4k")).facts}
    assert asked["context"] == 4096
