"""Packed ternary models answer as the trained ones: layers, whole forwards, decoding, and every road to the codes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from plait.formats.checkpoint import Checkpoint, CheckpointError, load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.step import step
from plait.ops.dispatch import use
from plait.ops.quant import quantize_ternary
from plait.ops.ternary import unpack_ternary
from plait.precision import RECIPES
from plait.precision.linear import Linear
from plait.precision.ternary_packed import TernaryLinear

PACKED = ("ternary-packed", "ternary-packed-int8")
BITNET = ModelConfig.from_pattern(
    "*-*-",
    vocab_size=90,
    d_model=128,
    ties_embeddings=True,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "rope": {"base": 1e4}, "sub_norm": True},
    mlp={"d_ff": 176, "gated": True, "sub_norm": True},
)
HYBRID = ModelConfig.from_pattern(
    "M-*",
    vocab_size=90,
    d_model=128,
    mamba2={"n_heads": 8, "head_dim": 32, "d_state": 16, "n_groups": 2, "chunk": 8, "proj_bias": True},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 32},
    mlp={"d_ff": 200},
)
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 90


def trained(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Hybrid:
    """A ternary model whose biases are not zero."""
    model = build(config, RECIPES["ternary"].computing_in(dtype), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_()
    return model


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}


@pytest.fixture(params=[BITNET, HYBRID], ids=["bitnet", "hybrid"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(trained(request.param), tmp_path / "source", "native")


@torch.no_grad()
def test_codes_and_sums_are_those_of_the_fake_quantised_layers(source: Path) -> None:
    model, packed = load(source), load(source, recipe="ternary-packed", dtype="float32")
    layers = ternary_layers(packed)
    assert len(layers) > 4
    for name, layer in layers.items():
        master, at = model.get_submodule(name), 0
        assert isinstance(master, Linear)
        for rows in layer.segments:
            codes, scale = quantize_ternary(master.weight[at : at + rows])
            assert torch.equal(unpack_ternary(layer.codes[at : at + rows], layer.d_in), codes)
            assert (layer.scales[at : at + rows] == scale).all()
            at += rows
        x = torch.randn(3, layer.d_in)
        # the same whole sums and the same roundings after them: nothing is left to differ but the high rows
        assert torch.equal(layer(x)[:, :at], master(x)[:, :at])
        assert (layer(x) - master(x)).abs().max() < 1e-6


@torch.no_grad()
def test_a_packed_model_is_the_trained_one(source: Path) -> None:
    want = load(source)(IDS).logits
    packed = load(source, recipe="ternary-packed", dtype="float32")
    assert (packed(IDS).logits - want).abs().max() < 1e-5
    with use("reference"):
        assert (packed(IDS).logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("recipe", PACKED)
@torch.no_grad()
def test_decoding_goes_by_one_call_and_gives_the_same(source: Path, recipe: str) -> None:
    for dtype, atol in (("float32", 1e-5), ("bfloat16", 0.1)):
        model = load(source, recipe=recipe, dtype=dtype)
        want = model(IDS).logits[:, 12:].float()
        cache = model.cache(2)
        model(IDS[:, :12], cache=cache)
        found = [step(model, IDS[:, t : t + 1], cache) for t in range(12, 19)]
        assert all(logits is not None for logits in found)
        assert (torch.cat(found, 1).float() - want).abs().max() < atol  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4, 7])
@torch.no_grad()
def test_threads_and_batches_agree_in_decoding(source: Path, batch: int) -> None:
    model, ids = load(source, recipe="ternary-packed", dtype="float32"), torch.randint(0, 90, (batch, 6))
    want = model(ids).logits[:, 3:]
    torch.set_num_threads(3)
    try:
        cache = model.cache(batch)
        model(ids[:, :3], cache=cache)
        found = [model(ids[:, t : t + 1], cache=cache).logits for t in range(3, 6)]
    finally:
        torch.set_num_threads(1)
    assert cache.tape is not None and cache.tape[1] is not None
    assert (torch.cat(found, 1) - want).abs().max() < 1e-5


def test_rows_of_dt_stay_high(source: Path) -> None:
    for name, layer in ternary_layers(load(source, recipe="ternary-packed")).items():
        assert (layer.high is not None) == name.endswith("in_proj")
        if layer.high is not None:
            assert layer.segments == (256, 256, 32, 32) and layer.high.weight.shape == (8, 128)
            assert layer.high.weight.dtype == torch.bfloat16 and layer.scales.dtype == torch.float32


@pytest.mark.parametrize("recipe", PACKED)
def test_every_road_leads_to_the_same_codes(source: Path, tmp_path: Path, recipe: str) -> None:
    loaded = load(source, recipe=recipe)
    Checkpoint.open(source).quantized(recipe).save(tmp_path / "x", "native", max_shard_bytes=50_000)
    written = load(tmp_path / "x", verify=True)
    again = load(save(written, tmp_path / "again", "native"))
    built = build(loaded.config, recipe, seed=3)
    others = {"written": written, "again": again}
    for other in others.values():
        assert other.recipe == loaded.recipe == RECIPES[recipe]
        assert other.state_dict().keys() == loaded.state_dict().keys() == built.state_dict().keys()
        for name, t in loaded.state_dict().items():
            assert other.state_dict()[name].dtype == t.dtype and torch.equal(other.state_dict()[name], t), name
    for name, layer in ternary_layers(built).items():
        assert torch.equal(layer.codes, ternary_layers(loaded)[name].codes)


@torch.no_grad()
def test_a_tied_head_is_copied_in_int8_and_the_embedding_stays() -> None:
    plain, model = (build(BITNET, recipe, seed=3) for recipe in PACKED)
    assert plain.head is None and model.head is not None and torch.equal(model.embed.weight, plain.embed.weight)
    assert (model.head_weight - model.embed.weight.float()).abs().max() < 0.01 * model.embed.weight.abs().max()
    a, b = plain(IDS).logits.float(), model(IDS).logits.float()
    assert 0 < (a - b).norm() / b.norm() < 0.03
    # an int8 recipe alone keeps the tied head as it is
    assert build(BITNET, "int8", seed=3).head is None


def test_packed_models_take_an_int8_head_later(source: Path, tmp_path: Path) -> None:
    Checkpoint.open(source).quantized("ternary-packed", "float32").save(tmp_path / "x", "native")
    late, early = load(tmp_path / "x", recipe="ternary-packed-int8"), load(source, recipe="ternary-packed-int8")
    for name, t in early.state_dict().items():
        assert torch.equal(late.state_dict()[name].float(), t.float()), name
    with pytest.raises(CheckpointError, match="are ternary-packed codes and cannot be computed as bf16"):
        load(tmp_path / "x", recipe="bf16")


def test_no_gradient_passes_and_dtypes_are_kept() -> None:
    model = build(HYBRID, "ternary-packed").to(torch.float64)
    layer = ternary_layers(model)["blocks.0.mixer.in_proj"]
    assert layer.scales.dtype == torch.float32 and layer.codes.dtype == torch.uint8
    x = torch.randn(2, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient passes through weights held as codes"):
        layer(x).sum().backward()


def test_weights_that_were_never_ternary_are_refused(tmp_path: Path) -> None:
    folder = save(build(BITNET, "fp32"), tmp_path / "x", "native")
    with pytest.raises(CheckpointError, match="trained in 'bf16' and would be lost in 'ternary-packed'"):
        load(folder, recipe="ternary-packed")


def test_a_weight_of_no_numbers_is_named(tmp_path: Path) -> None:
    model = trained(BITNET)
    with torch.no_grad():
        model.get_submodule("blocks.1.mixer.up_proj").weight[3, 5] = torch.nan  # type: ignore[index]
    folder = save(model, tmp_path / "x", "native")
    with pytest.raises(CheckpointError, match=r"'blocks.1.mixer.up_proj.weight' holds what is no number"):
        load(folder, recipe="ternary-packed")


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 2.0**-22), ("bfloat16", 2.0**-16)])
def test_masters_made_from_codes_round_to_them_again(source: Path, tmp_path: Path, dtype: str, rel: float) -> None:
    packed = Checkpoint.open(source).quantized("ternary-packed", "float32")
    packed.dequantized(dtype).save(tmp_path / "masters", "native")
    assert Checkpoint.open(tmp_path / "masters").recipe == "ternary"
    again = load(tmp_path / "masters", recipe="ternary-packed")
    for name, layer in ternary_layers(load(source, recipe="ternary-packed", dtype="float32")).items():
        other = again.get_submodule(name)
        assert isinstance(other, TernaryLinear) and torch.equal(other.codes, layer.codes)
        assert ((other.scales - layer.scales).abs() <= rel * layer.scales).all()
        if layer.high is not None:
            assert other.high is not None and _same(other.high.weight, layer.high.weight)
            assert _same(other.high.bias, layer.high.bias) and _same(other.bias, layer.bias)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no packed ternary codes"):
        Checkpoint.open(source).dequantized()


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.bfloat16(), b.bfloat16())
