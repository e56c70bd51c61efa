"""The test models as GGUF files: every weight is there once, in the layout that llama.cpp reads."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from plait.cli.benches import shapes
from plait.model.config import ModelConfig
from plait.model.hybrid import build

gguf = pytest.importorskip("gguf", reason="pip install gguf")

HYBRID = ModelConfig.from_pattern(
    "M-*-",
    name="tiny",
    vocab_size=96,
    d_model=32,
    mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    mlp={"d_ff": 64},
)
LLAMA = ModelConfig.from_pattern(
    "*-*-",
    name="tiny-llama",
    family="llama",
    vocab_size=96,
    d_model=32,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope": {}},
    mlp={"d_ff": 64, "activation": "silu", "gated": True},
)


@pytest.fixture
def writer() -> ModuleType:
    path = Path(__file__).parents[3] / "bench" / "peers" / "gguf_models.py"
    spec = importlib.util.spec_from_file_location("gguf_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", [HYBRID, LLAMA], ids=["hybrid", "llama"])
def test_every_weight_is_written_once(writer: ModuleType, config: ModelConfig, tmp_path: Path) -> None:
    writer.write(config, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert sum(int(t.n_elements) for t in reader.tensors) == config.cost().params
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert (
        kinds["output.weight"] == kinds["blk.0.ffn_up.weight" if config is LLAMA else "blk.0.ssm_in.weight"] == "BF16"
    )
    assert kinds["output_norm.weight"] == "F32"


def test_a_bitnet_is_written_as_what_llama_cpp_runs(writer: ModuleType, tmp_path: Path) -> None:
    bitnet = replace(shapes.BITNET_2B, layers=LLAMA.layers, vocab_size=96, d_model=32)
    config = shapes.as_llama(bitnet)
    writer.write(config, tmp_path / "m.gguf")
    tensors = {t.name: int(t.n_elements) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert sum(tensors.values()) == config.cost().params and "output.weight" not in tensors


def test_rows_of_q_and_k_are_put_side_by_side_for_their_rotation(writer: ModuleType) -> None:
    weights = dict(build(LLAMA).state_dict())
    named = dict(writer.tensors(LLAMA, weights))
    ours, theirs = weights["blocks.0.mixer.q_proj.weight"], named["blk.0.attn_q.weight"]
    # of a head of 8, they turn rows 0 and 1 together where we turn rows 0 and 4
    assert torch.equal(theirs[:4], ours[[0, 4, 1, 5]]) and torch.equal(theirs[8:10], ours[[8, 12]])
    assert torch.equal(named["blk.0.attn_v.weight"], weights["blocks.0.mixer.v_proj.weight"])


def test_all_models_of_the_benchmarks_can_be_written(writer: ModuleType) -> None:
    assert set(writer.MODELS) == set(shapes.MODELS)
