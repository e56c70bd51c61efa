"""Quantising checkpoints: the same codes by every road, bit by bit, a few rows at a time, and refusals with advice."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.formats import FORMATS, quantize
from plait.formats.checkpoint import Checkpoint, CheckpointError, load, save
from plait.formats.format import Contents
from plait.formats.shards import write_tensors
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.precision import RECIPES
from plait.precision.weight_only import WeightOnlyLinear

IDS = torch.arange(2 * 19).view(2, 19) * 7 % 90


@pytest.fixture
def model() -> Hybrid:
    """A hybrid of every kind of layer; some of its rows are no multiple of 64."""
    config = ModelConfig.from_pattern(
        "M-*E",
        vocab_size=90,
        d_model=128,
        mamba2={"n_heads": 4, "head_dim": 32, "d_state": 16, "n_groups": 2, "chunk": 8, "proj_bias": True},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 32},
        mlp={"d_ff": 200},
        moe={"n_experts": 4, "n_chosen": 2, "d_ff": 64, "d_shared": 128},
    )
    return build(config, "fp32", seed=2)


@pytest.fixture
def source(model: Hybrid, tmp_path: Path) -> Path:
    return save(model, tmp_path / "source", "native")


def _same(a: Hybrid, b: Hybrid) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        t.dtype == right[name].dtype and torch.equal(t, right[name]) for name, t in left.items()
    )


@pytest.mark.parametrize("recipe", ["int8", "int4", "int8-32-zero", "int4-64-zero"])
@pytest.mark.parametrize("n_at_once", [128 * 40, 1 << 22])
def test_every_road_leads_to_the_same_codes(
    source: Path, model: Hybrid, tmp_path: Path, recipe: str, n_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_AT_ONCE", n_at_once)
    loaded = load(source, recipe=recipe)
    Checkpoint.open(source).quantized(recipe).save(tmp_path / "converted", "native", max_shard_bytes=50_000)
    written = load(tmp_path / "converted")
    again = load(save(written, tmp_path / "again", "native"), recipe=recipe, verify=True)
    built = build(model.config, recipe, seed=2)
    for other in (written, again, built):
        assert other.recipe == loaded.recipe == RECIPES[recipe] and _same(other, loaded)
    with torch.no_grad():
        assert torch.equal(written(IDS).logits, loaded(IDS).logits)
    assert sum(t.nbytes for n, t in loaded.state_dict().items() if n.startswith("blocks.0.mixer.in_proj.codes")) > 0
    checkpoint = Checkpoint.open(tmp_path / "converted")
    assert checkpoint.recipe == recipe and checkpoint.dtype == torch.bfloat16
    assert checkpoint.provenance["parent"]["name"] == "source"  # type: ignore[index]


def test_parts_may_be_read_in_any_order_and_twice(source: Path) -> None:
    tensors = Checkpoint.open(source).quantized("int4-32-zero").tensors
    parts = [f"blocks.2.mixer.q_proj.{part}" for part in ("codes", "scales", "zeros")]
    first = [tensors[name].read() for name in parts]
    for order in ([2, 1, 0], [1, 0, 2], [0, 0, 1, 1, 2]):
        assert all(torch.equal(tensors[parts[i]].read(), first[i]) for i in order)
    assert first[0].dtype == torch.uint8 and first[0].shape == (128, 64)


def test_a_dtype_is_of_what_stays_high_and_of_products(source: Path, tmp_path: Path) -> None:
    loaded = load(source, recipe="int8", dtype="float32")
    assert loaded.recipe.compute == loaded.embed.weight.dtype == torch.float32
    Checkpoint.open(source).quantized("int8", "float32").save(tmp_path / "x", "native")
    assert _same(load(tmp_path / "x"), loaded) and load(tmp_path / "x").recipe.compute == torch.float32
    # the other way round, a dtype never touches codes and scales
    half = load(tmp_path / "x", dtype="bfloat16")
    assert half.recipe.compute == half.embed.weight.dtype == torch.bfloat16
    wide = save(half, tmp_path / "wide", "native", dtype="float32")
    for name, t in load(wide).state_dict().items():
        if name.endswith(("codes", "scales")):
            assert torch.equal(t, loaded.state_dict()[name])


def test_logits_of_int8_are_near_those_of_the_source(source: Path) -> None:
    with torch.no_grad():
        exact = load(source)(IDS).logits
        for recipe, bound in (("int8", 0.03), ("int4-32", 0.35)):
            logits = load(source, recipe=recipe, dtype="float32")(IDS).logits
            assert float((logits - exact).norm() / exact.norm()) < bound


def test_a_recipe_of_ones_own_is_loaded(source: Path) -> None:
    own = dataclasses.replace(RECIPES["int4-32"], name="mine", compute=torch.float32)
    loaded = load(source, recipe=own)
    assert loaded.recipe == own and isinstance(loaded.get_submodule("blocks.0.mixer.in_proj"), WeightOnlyLinear)


def test_codes_become_nothing_else(source: Path, tmp_path: Path) -> None:
    Checkpoint.open(source).quantized("int8").save(tmp_path / "x", "native")
    for recipe in ("bf16", "int4", "int8-32"):
        with pytest.raises(CheckpointError, match=f"its weights are int8 codes and cannot be computed as {recipe}"):
            load(tmp_path / "x", recipe=recipe)
    with pytest.raises(CheckpointError, match="are int8 codes already and cannot become int4"):
        Checkpoint.open(tmp_path / "x").quantized("int4")
    with pytest.raises(CheckpointError, match="recipe 'int8': no reader of Hugging Face folders knows these codes"):
        save(load(tmp_path / "x"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(CheckpointError, match="recipe 'fp32' holds no codes to quantise to; those that do: int8"):
        Checkpoint.open(source).quantized("fp32")
    with pytest.raises(ValueError, match="did you mean 'int4-32-zero'"):
        Checkpoint.open(source).quantized("int4-32-zeros")


def test_weights_that_no_scale_holds_are_named(model: Hybrid, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.2.mixer.q_proj").weight[3, 5] = float("nan")  # type: ignore[index]
    folder = save(model, tmp_path / "nan", "native")
    with pytest.raises(
        CheckpointError, match=r"tensor 'blocks.2.mixer.q_proj.weight': .* keep this tensor in bfloat16"
    ):
        load(folder, recipe="int4")
    with pytest.raises(CheckpointError, match="q_proj"):
        Checkpoint.open(folder).quantized("int4").save(tmp_path / "x", "native")
    assert not (tmp_path / "x").exists()


def test_codes_of_another_kind_or_shape_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    Checkpoint.open(source).quantized("int8").save(folder, "native")
    manifest = json.loads((folder / "plait.json").read_text())
    for recipe, message in (("int8-32", "the config asks for"), ("int8-128-zero", "missing"), ("int9", "unknown")):
        manifest["config"]["recipe"] = recipe
        (folder / "plait.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            load(folder, verify=False)
    manifest["config"]["recipe"] = "int8"
    (folder / "plait.json").write_text(json.dumps(manifest))
    tensors = dict(Checkpoint.open(folder).tensors)
    tensors["head.codes"] = LazyTensor.of(tensors["head.codes"].read().view(torch.uint8))
    (folder / "new").mkdir()
    write_tensors(folder / "new", tensors)
    (folder / "new" / "model.safetensors").replace(folder / "model.safetensors")
    manifest["files"]["model.safetensors"]["bytes"] = (folder / "model.safetensors").stat().st_size
    (folder / "plait.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'head.codes' holds torch.uint8, 'int8' has torch.int8 there"):
        load(folder, verify=False)


MEASURE = """
import sys, torch, plait
torch.set_num_threads(1)
plait.load(sys.argv[1], device="cpu", recipe="int4")
def memory(field): return next(1024 * int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS:")
model = plait.load(sys.argv[2], device="cpu", recipe="int4", verify=False)
print(memory("VmHWM:") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is reset through /proc")
def test_loading_needs_the_result_and_little_more(source: Path, tmp_path: Path) -> None:
    """A float32 checkpoint seven times as large as its codes never lies in memory."""
    config = ModelConfig.from_pattern("-" * 8, vocab_size=64, d_model=1024, mlp={"d_ff": 2048})
    with torch.device("meta"):
        shapes = Hybrid(config, RECIPES["fp32"]).state_dict()
    same = torch.full((2048 * 1024,), 0.5)
    tensors = {name: LazyTensor.of(same[: t.numel()].view(t.shape)) for name, t in shapes.items()}
    (tmp_path / "large").mkdir()
    write = FORMATS["native"].write
    write(Contents(config=config, tensors=tensors, provenance={}), tensors, tmp_path / "large", 1 << 30, None)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "large"], capture_output=True, text=True, check=True
    )
    growth, held = map(int, done.stdout.split())
    assert 0 < held < 20e6
    # a matrix as it is stored and what its rounding needs, besides the result; the source has 134 MB
    assert growth < held + 40e6
