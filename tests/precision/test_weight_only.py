"""Weights held as int8 and int4 codes: what the recipes say, what stays high, and that nobody trains them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plait
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.precision import RECIPES
from plait.precision.linear import Linear
from plait.precision.weight_only import WeightOnlyLinear

# the ternary ones round their inputs too: test_ternary_packed.py
CODED = [name for name, recipe in RECIPES.items() if recipe.weight_only and not name.startswith("ternary")]
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 90


def _config(**changed: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "vocab_size": 90,
        "d_model": 128,
        "mamba2": {"n_heads": 4, "head_dim": 32, "d_state": 16, "n_groups": 2, "chunk": 8, "proj_bias": True},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32},
        "mlp": {"d_ff": 256},
        "moe": {"n_experts": 4, "n_chosen": 2, "d_ff": 64, "d_shared": 128},
    }
    return ModelConfig.from_pattern("M-*E", **(sizes | changed))


def _layers(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if type(layer) is kind}


def test_the_family_of_recipes() -> None:
    family = {f"int{bits}-{group}{zero}" for bits in (4, 8) for group in (32, 64, 128) for zero in ("", "-zero")}
    assert set(CODED) == family | {"int8", "int4"}
    for name in family:
        bits, group, *zero = name.removeprefix("int").split("-")
        layer = RECIPES[name].linear(256, 5, role="mlp.up_proj")
        assert isinstance(layer, WeightOnlyLinear)
        assert (layer.bits, layer.group, layer.zeros is not None) == (int(bits), int(group), bool(zero))


@pytest.mark.parametrize("name", CODED)
def test_a_model_of_codes_computes_what_its_weights_say(name: str) -> None:
    """The same model with the weights that the codes stand for gives the same logits, and a loss."""
    model = build(_config(), RECIPES[name].computing_in(torch.float32), seed=1)
    plain = build(_config(), "fp32", seed=1)
    for at, layer in _layers(model, WeightOnlyLinear).items():
        assert isinstance(layer, WeightOnlyLinear)
        master = plain.get_submodule(at)
        assert isinstance(master, Linear)
        moved = (master.weight - layer.weight).norm() / master.weight.norm()
        assert 0 < moved < (0.01 if layer.bits == 8 else 0.12), "codes are those of the weights of the same seed"
        master.weight = nn.Parameter(layer.weight)
    ours, theirs = model(IDS, labels=IDS), plain(IDS, labels=IDS)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_errors_shrink_with_bits_and_groups() -> None:
    logits = {"bf16": build(_config(), "fp32")(IDS).logits}
    for name in ("int8-32", "int8", "int4-32", "int4-128"):
        logits[name] = build(_config(), RECIPES[name].computing_in(torch.float32))(IDS).logits
    error = {k: float((v - logits["bf16"]).norm() / logits["bf16"].norm()) for k, v in logits.items()}
    assert error["int8"] < 0.03 and error["int4-32"] < 0.35
    assert error["int8-32"] < error["int8"] < error["int4-32"] < error["int4-128"]


@pytest.mark.parametrize("name", ["int8", "int4", "int4-32-zero"])
def test_what_stays_high(name: str) -> None:
    model = build(_config(), name)
    coded = set(_layers(model, WeightOnlyLinear))
    assert {"head", "blocks.0.mixer.in_proj", "blocks.2.mixer.q_proj", "blocks.3.mixer.shared.up_proj"} <= coded
    assert not _layers(model, Linear)
    assert isinstance(model.head, WeightOnlyLinear) and (model.head.bits, model.head.group) == (8, 128)
    state = model.state_dict()
    assert state["blocks.0.mixer.A_log"].dtype == torch.float32
    high = ("embed.weight", "norm.weight", "blocks.0.mixer.conv.weight", "blocks.0.mixer.in_proj.bias")
    high += ("blocks.3.mixer.experts.up", "blocks.3.mixer.router.weight")
    assert {state[name].dtype for name in high} == {torch.bfloat16}


def test_a_tied_head_and_rows_that_no_group_divides_stay_high() -> None:
    model = build(_config(ties_embeddings=True, mlp={"d_ff": 192}), "int8")
    assert model.head is None
    assert set(_layers(model, Linear)) == {"blocks.1.mixer.down_proj"}
    model = build(_config(d_model=100), "int4-32")
    assert isinstance(model.head, Linear) and isinstance(model.get_submodule("blocks.0.mixer.in_proj"), Linear)


def test_a_ternary_model_keeps_its_head_high() -> None:
    assert F.linear(IDS[:1, :1] * torch.ones(1, 128), build(_config(), "ternary").head_weight).isfinite().all()
    head = build(_config(), "ternary").head
    assert isinstance(head, Linear) and head.number_format.weight is None


def test_training_codes_is_refused_with_advice() -> None:
    out = build(_config(), "int4")(IDS, labels=IDS)
    with pytest.raises(RuntimeError, match="train the model that they were made from .* or run this one under"):
        out.loss.backward()


def test_without_a_gradient_nothing_is_remembered() -> None:
    layer = RECIPES["int8"].linear(128, 7, role="mlp.up_proj")
    assert isinstance(layer, WeightOnlyLinear)
    layer.quantize(torch.randn(7, 128))
    x = torch.randn(2, 128, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad and not list(layer.parameters())


def test_scales_stay_float16_whatever_the_model_is_cast_to() -> None:
    model = build(_config(), "int4")
    before = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(("scales", "codes"))}
    model.to(torch.bfloat16).float()
    after = model.state_dict()
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype for name, t in before.items())


def test_a_step_with_a_cache_is_the_whole_run() -> None:
    model: Hybrid = build(_config(), RECIPES["int4"].computing_in(torch.float32))
    whole = model(IDS).logits
    cache = model.cache(2)
    parts = [
        model(IDS[:, :10], cache=cache).logits,
        *(model(IDS[:, i : i + 1], cache=cache).logits for i in range(10, 19)),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "rows"), [("int8", 256), ("int4", 128)])
def test_codes_and_back_from_the_top(bits: str, rows: int) -> None:
    room = getattr(plait.quant, bits)
    w = torch.randn(5, 256)
    codes, scales, zeros = room.quantize(w, group=32)
    assert codes.shape == (5, rows) and scales.shape == (5, 8) and zeros is None
    held = room.dequantize(codes, scales, zeros)
    assert float((held - w).norm() / w.norm()) < (0.006 if bits == "int8" else 0.1)
    shifted = w + 5
    assert room.dequantize(*room.quantize(shifted, zeros=True)).sub(shifted).norm() < 0.7 * (
        room.dequantize(*room.quantize(shifted)).sub(shifted).norm()
    )
