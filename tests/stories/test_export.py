"""What we export, `transformers` loads and computes the same, for every family and in one file or many."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.ops.rope import Rope

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[dev])")

MAMBA2 = Mamba2(n_heads=6, head_dim=8, d_state=8, n_groups=2, chunk=8)
SWIGLU = MLP(d_ff=48, activation="silu", gated=True)
RELU2 = MLP(d_ff=40)
EXPERTS = MoE(
    n_experts=8, n_chosen=3, d_ff=16, d_shared=20, d_latent=12, n_groups=4, n_top_groups=2, scale=2.5, bias=True
)


def heads(**more: object) -> Attention:
    return Attention(n_heads=4, n_kv_heads=2, head_dim=8, **more)  # type: ignore[arg-type]


def model_of(layers: tuple[object, ...], family: str, **more: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=67, d_model=32, layers=layers, family=family, eos_ids=(2, 5), bos_id=1, pad_id=0, **more
    )  # type: ignore[arg-type]


def ropes(scaling: str) -> tuple[object, ...]:
    rope = Rope(base=1e4, scaling=scaling, stretch=4.0, original_context=16, high=32.0 if scaling == "yarn" else 4.0)  # type: ignore[arg-type]
    return (heads(rope=rope), SWIGLU) * 2


PLAIN_ROPE = (heads(rope=Rope(base=5e5)), SWIGLU) * 2
MODELS = {
    "hybrid": model_of((MAMBA2, RELU2, heads(), MAMBA2, RELU2), "nemotron_h"),
    "hybrid with tied embeddings": model_of((MAMBA2, RELU2, heads()), "nemotron_h", ties_embeddings=True),
    "hybrid with wide mamba heads": model_of(
        (Mamba2(n_heads=6, head_dim=10, d_state=8, n_groups=3), RELU2), "nemotron_h"
    ),
    "hybrid with experts": model_of((MAMBA2, EXPERTS, heads(), EXPERTS), "nemotron_h"),
    "hybrid with experts and MLP": model_of(
        (MAMBA2, MLP(d_ff=24, bias=True), heads(), EXPERTS), "nemotron_h", norm_eps=1e-3
    ),
    "Transformer without positions": model_of((heads(), RELU2) * 2, "nemotron_h"),
    "mamba2": model_of((Mamba2(n_heads=8, head_dim=8, d_state=8, n_groups=2, chunk=8),) * 3, "mamba2"),
    "mamba2 with biases": model_of(
        (Mamba2(n_heads=4, head_dim=8, d_state=8, n_groups=1, chunk=8, proj_bias=True, conv_bias=False),) * 2,
        "mamba2",
        ties_embeddings=True,
    ),
    "llama": model_of(PLAIN_ROPE, "llama"),
    "llama with biases": model_of(
        (heads(rope=Rope(), qkv_bias=True, out_bias=True), MLP(d_ff=48, activation="silu", gated=True, bias=True)),
        "llama",
    ),
    "llama, rope linear": model_of(ropes("linear"), "llama"),
    "llama, rope llama3": model_of(ropes("llama3"), "llama"),
    "llama, rope yarn": model_of(ropes("yarn"), "llama", max_context=64),
    "SwiGLU and positions of no family": model_of(PLAIN_ROPE, ""),
    "qwen2": model_of((heads(rope=Rope(base=1e6), qkv_bias=True), SWIGLU) * 2, "qwen2", ties_embeddings=True),
    "qwen3": model_of((heads(rope=Rope(base=1e6), qk_norm=True), SWIGLU) * 2, "qwen3", norm_eps=1e-6),
    "bitnet": model_of(
        (heads(rope=Rope(base=5e5), sub_norm=True), MLP(d_ff=48, gated=True, sub_norm=True)) * 2,
        "bitnet",
        ties_embeddings=True,
        recipe="ternary",
    ),
}


@torch.no_grad()
def fresh(config: ModelConfig) -> Hybrid:
    """Weights with nothing at its default: norms, biases and corrections are random too."""
    model = build(config, recipe="ternary" if config.recipe == "ternary" else "fp32")
    model.recipe = model.recipe.computing_in(torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor + 0.2 * noise if tensor.dim() == 1 else noise / tensor.shape[-1] ** 0.5)
        if name.endswith("dt_bias"):
            # around the lower bound that transformers clamps to where it must not
            tensor.copy_(noise - 7)
    return model


@torch.no_grad()
def theirs(folder: Path, ids: Tensor) -> Tensor:
    """Logits of the library, with the bounds of the time step that the config asks for."""
    # it asks for another library before it reads ternary models, and then does without
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.quantizers.quantizer_bitnet.is_accelerate_available", lambda: True)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    # its ternary layers compile their helpers, which needs a C++ compiler and a minute
    with torch.compiler.set_stance("force_eager"):
        return model.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    model = fresh(MODELS[name]).eval()
    ids = torch.randint(0, 67, (2, 37), generator=torch.Generator().manual_seed(1))
    save(model, tmp_path / "hf", format="hf")
    reread = load(tmp_path / "hf", device="cpu", dtype="float32")
    for key, tensor in model.state_dict().items():
        assert torch.equal(reread.state_dict()[key], tensor), key
    ours = reread(ids).logits
    assert ours.std() > 0.1
    # a last-bit difference before rounding to int8 may move a code of a ternary model
    atol = 1e-3 if name == "bitnet" else 1e-4
    assert (theirs(tmp_path / "hf", ids) - ours).abs().max() < atol


def test_transformers_reads_our_shards(tmp_path: Path) -> None:
    model = fresh(MODELS["hybrid with experts"])
    save(model, tmp_path / "hf", max_shard_bytes=10_000)
    assert len(list(tmp_path.glob("hf/*.safetensors"))) > 3
    ids = torch.randint(0, 67, (1, 9))
    assert (theirs(tmp_path / "hf", ids) - model(ids).logits).abs().max() < 1e-4
    reread = load(tmp_path / "hf", device="cpu")
    assert all(torch.equal(reread.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_transformers_reads_our_bfloat16(tmp_path: Path) -> None:
    model = fresh(MODELS["hybrid with experts and MLP"])
    save(model, tmp_path / "hf", dtype="bfloat16")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert found.generation_config.eos_token_id == [2, 5] and found.config.eos_token_id == [2, 5]
    ours = load(tmp_path / "hf", device="cpu")
    assert torch.equal(found.get_input_embeddings().weight, ours.embed.weight)


@torch.no_grad()
def test_we_read_what_transformers_saves(tmp_path: Path) -> None:
    model = fresh(MODELS["hybrid with experts and MLP"])
    save(model, tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs", device="cpu")
    assert back.config.layers == model.config.layers
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
