"""BitNet's packed folders: the published layout byte by byte, both ways, and what is refused before writing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.cli.launch import launch
from plait.formats.checkpoint import Checkpoint, CheckpointError, load, save
from plait.formats.packed import _our_rows, _their_rows
from plait.formats.tensors import LazyTensor
from plait.model.hybrid import build
from plait.ops.ternary import pack_ternary, unpack_ternary

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def packed(shared: Path) -> Path:
    return shared / "parity" / "bitnet_packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def change(folder: Path, changed: dict[str, Tensor | None], words: dict[str, str] | None = None) -> None:
    """Replace tensors of a folder, or leave them out; and words of its quantization_config."""
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= words or {}
    (folder / "config.json").write_text(json.dumps(config))


def test_bytes_are_those_of_transformers(shared: Path) -> None:
    vectors = load_file(shared / "vectors" / "bitnet.safetensors")
    cases = [name.removesuffix(".packed") for name in vectors if name.endswith(".packed")]
    assert cases
    for case in cases:
        codes, theirs = vectors[f"{case}.ternary"], vectors[f"{case}.packed"]
        ours = pack_ternary(codes.to(torch.int8))
        assert torch.equal(_their_rows(LazyTensor.of(ours), len(theirs), codes.shape[1], 0, len(theirs)), theirs)
        # in pieces, as a large matrix is read
        pieces = [
            _our_rows(LazyTensor.of(theirs), len(codes), case, i, min(7, len(codes) - i))
            for i in range(0, len(codes), 7)
        ]
        assert torch.equal(torch.cat(pieces), ours)


def test_rows_that_are_no_multiple_of_four_leave_fields_empty() -> None:
    codes = torch.tensor([[-1], [0], [1], [1], [0], [1]], dtype=torch.int8)
    theirs = _their_rows(LazyTensor.of(pack_ternary(codes)), 2, 1, 0, 2)
    assert theirs.flatten().tolist() == [0 | 2 << 2 | 1 << 4, 1 | 2 << 2 | 2 << 4]
    ours = _our_rows(LazyTensor.of(theirs), 6, "", 0, 6)
    assert torch.equal(unpack_ternary(ours, 1), codes)


def test_what_is_written_is_what_was_read(packed: Path, tmp_path: Path) -> None:
    for road in ("hf", "native"):
        Checkpoint.open(packed).save(tmp_path / road, road)
    Checkpoint.open(tmp_path / "native").save(tmp_path / "back", "hf")
    save(load(packed, device="cpu"), tmp_path / "model", "hf")
    before = load_file(packed / "model.safetensors")
    for folder in ("hf", "back", "model"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == before.keys()
        # scales are written in float32, which holds every bfloat16
        assert all(
            torch.equal(after[name].to(t.dtype), t) and after[name].shape == t.shape for name, t in before.items()
        )
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["quantization_mode"] == "offline" and config["torch_dtype"] == "bfloat16"


@torch.no_grad()
def test_masters_become_the_packed_model(shared: Path, tmp_path: Path) -> None:
    masters = shared / "parity" / "bitnet_master"
    words = [
        "convert",
        str(masters),
        str(tmp_path / "x"),
        "--to",
        "hf",
        "--quantize",
        "ternary-packed",
        "--dtype",
        "float32",
    ]
    assert launch(words) == 0
    a, b = load(masters, device="cpu", dtype="float32"), load(tmp_path / "x", device="cpu")
    assert (a.recipe.name, b.recipe.name) == ("ternary", "ternary-packed")
    ids = torch.arange(40).view(2, 20) * 5 % 256
    assert (a(ids).logits - b(ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_packed_becomes_masters_of_the_same_answers(packed: Path, tmp_path: Path) -> None:
    words = ["convert", str(packed), str(tmp_path / "x"), "--to", "hf", "--dequantize", "--dtype", "float32"]
    assert launch(words) == 0
    model = load(tmp_path / "x", device="cpu")
    ids = torch.arange(40).view(2, 20) * 5 % 256
    assert model.recipe.name == "ternary"
    assert (model(ids).logits - load(packed, device="cpu", dtype="float32")(ids).logits).abs().max() < 1e-4


def test_a_bitlinear_divides_by_its_scale(copy: Path, packed: Path) -> None:
    scales = {k: 1 / t.float() for k, t in load_file(copy / "model.safetensors").items() if k.endswith("_scale")}
    change(copy, dict(scales), {"linear_class": "bitlinear"})
    a, b = Checkpoint.open(copy), Checkpoint.open(packed)
    for name, t in b.tensors.items():
        torch.testing.assert_close(a.tensors[name].read(), t.read(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({Q + "_scale": torch.ones(4)}, r"q_proj.weight_scale' has shape \(4,\) .* one number, \(1,\)"),
        ({Q + "_scale": torch.ones(64, 1)}, r"q_proj.weight_scale' has shape \(64, 1\)"),
        ({Q + "_scale": torch.ones(1, dtype=torch.int32)}, "holds torch.int32"),
        ({Q + "_scale": torch.zeros(1)}, "holds 0.0, expected a positive number"),
        ({Q + "_scale": torch.full((1,), torch.nan)}, "holds nan"),
        ({Q + "_scale": None}, "is packed, but .*q_proj.weight_scale' is missing"),
        (
            {Q: torch.zeros(15, 64, dtype=torch.uint8)},
            r"shape \(15, 64\); with four rows a byte .* 64 x 64 has \(16, 64\)",
        ),
        ({Q: torch.zeros(64, 64, dtype=torch.uint8)}, r"shape \(64, 64\); with four rows a byte"),
        ({Q: torch.zeros(64, 64)}, "says that weights are packed, but .* holds torch.float32"),
        ({Q: None}, "tensors are missing .*q_proj"),
        ({"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)}, "no place in the model"),
    ],
)
def test_wrong_packed_files_are_refused(
    changed: dict[str, Tensor | None], message: str, copy: Path, tmp_path: Path
) -> None:
    change(copy, changed)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)
    assert launch(["convert", str(copy), str(tmp_path / "x"), "--to", "native"]) == 2
    assert not (tmp_path / "x").exists()


def test_a_code_of_no_value_is_refused_and_nothing_is_left(copy: Path, tmp_path: Path) -> None:
    weight = load_file(copy / "model.safetensors")[Q]
    weight[3, 5] |= 3 << 4
    change(copy, {Q: weight})
    with pytest.raises(CheckpointError, match="q_proj.weight holds a code that stands for no ternary value"):
        Checkpoint.open(copy).save(tmp_path / "x", "native")
    assert not (tmp_path / "x").exists()


def test_rows_of_different_scales_stay_native(packed: Path, tmp_path: Path) -> None:
    model = load(packed, device="cpu")
    model.get_submodule("blocks.0.mixer.q_proj").scales[5] *= 2  # type: ignore[index, operator]
    with pytest.raises(CheckpointError, match="its rows differ in scale"):
        save(model, tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()
    save(model, tmp_path / "x", "native")


def test_codes_that_no_reader_knows_stay_native(packed: Path, tmp_path: Path) -> None:
    config = load(packed, device="cpu").config
    with pytest.raises(CheckpointError, match="save as native"):
        save(build(config, "ternary-packed-int8"), tmp_path / "x", "hf")
