"""Loading and saving: which dtype, which recipe, which files, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plait
from plait.formats import FORMATS
from plait.formats.checkpoint import Checkpoint, load, save
from plait.formats.error import CheckpointError
from plait.model.hybrid import Hybrid

KEPT = ("A_log", ".D", "dt_bias", "correction")


def _dtypes(model: Hybrid) -> set[torch.dtype]:
    return {t.dtype for name, t in model.state_dict().items() if not name.endswith(KEPT)}


@pytest.fixture
def folder(tiny: Hybrid, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "float32")


@pytest.fixture
def half(tiny: Hybrid, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "bfloat16", dtype="bfloat16")


def test_the_public_names_are_these() -> None:
    assert plait.load is load and plait.save is save


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", (1 << 30, 2000))
def test_a_round_trip_is_bitwise(format: str, max_shard_bytes: int, tiny: Hybrid, tmp_path: Path) -> None:
    save(tiny, tmp_path / "x", format=format, max_shard_bytes=max_shard_bytes)
    again = load(tmp_path / "x", device="cpu")
    assert again.config.layers == tiny.config.layers
    assert all(torch.equal(again.state_dict()[name], t) for name, t in tiny.state_dict().items())
    ids = torch.randint(0, 50, (2, 11))
    assert torch.equal(again(ids).logits, tiny(ids).logits)


def test_a_loaded_model_is_complete_and_can_be_trained(half: Path) -> None:
    model = load(half, device="cpu")
    assert all(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in model.state_dict().values())


def test_dtype_and_recipe_are_as_stored(folder: Path, half: Path) -> None:
    whole, less = load(folder, device="cpu"), load(half, device="cpu")
    assert (_dtypes(whole), whole.recipe.name, whole.recipe.compute) == ({torch.float32}, "fp32", torch.float32)
    assert (_dtypes(less), less.recipe.name, less.recipe.compute) == ({torch.bfloat16}, "bf16", torch.bfloat16)


@pytest.mark.parametrize("dtype", ("bfloat16", torch.float32, "float64"))
def test_an_explicit_dtype_sets_parameters_and_products(dtype: str | torch.dtype, half: Path) -> None:
    model = load(half, device="cpu", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert (_dtypes(model), model.recipe.compute) == ({wanted}, wanted)
    assert model(torch.tensor([[1, 2]])).logits.dtype == wanted


def test_training_gets_float32_masters_computed_in_bfloat16(half: Path) -> None:
    model = load(half, device="cpu", dtype="float32", recipe="bf16")
    assert (_dtypes(model), model.recipe.compute) == ({torch.float32}, torch.bfloat16)


def test_sensitive_parameters_are_float32_in_memory_and_on_disk(half: Path) -> None:
    state = load(half, device="cpu", dtype="bfloat16").state_dict()
    kept = [name for name in state if name.endswith(KEPT)]
    assert len(kept) == 4
    assert all(state[name].dtype == torch.float32 for name in kept)
    stored = Checkpoint.open(half).tensors
    assert all(stored[name].dtype == torch.float32 for name in kept)


def test_float16_is_read_and_computed_in_bfloat16(tiny: Hybrid, tmp_path: Path) -> None:
    save(tiny.half(), tmp_path / "x")
    model = load(tmp_path / "x", device="cpu")
    assert (_dtypes(model), model.recipe.compute) == ({torch.float16}, torch.bfloat16)
    assert torch.equal(model.embed.weight, tiny.embed.weight)
    with pytest.raises(ValueError, match="float16.*squared ReLU"):
        load(tmp_path / "x", dtype="float16")


def test_a_recipe_that_the_model_needs_is_kept(tiny: Hybrid, tmp_path: Path) -> None:
    from plait.model.hybrid import recipe_of

    tiny.recipe = recipe_of("ternary")
    save(tiny, tmp_path / "x", format="native")
    assert Checkpoint.open(tmp_path / "x").recipe == "ternary"
    model = load(tmp_path / "x", device="cpu")
    assert (model.recipe.name, model.recipe.compute) == ("ternary", torch.float32)
    assert load(tmp_path / "x", device="cpu", recipe="fp32").recipe.name == "fp32"


def test_tokenizer_files_go_along(tiny: Hybrid, folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    model = load(folder, device="cpu")
    save(model, tmp_path / "again", format="native")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "hello"
    manifest = json.loads((tmp_path / "again" / "plait.json").read_text())
    assert "tokenizer.json" in manifest["files"]
    save(tiny, tmp_path / "third", tokenizer=folder)
    assert (tmp_path / "third" / "tokenizer.json").exists()


def test_overwriting_needs_a_word_and_a_checkpoint(tiny: Hybrid, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save(tiny, folder)
    save(tiny, folder, format="native", overwrite=True)
    assert Checkpoint.open(folder).provenance["format"] == "native"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        save(tiny, tmp_path / "photos", overwrite=True)
    assert os.listdir(tmp_path / "photos") == ["me.jpg"]


def test_a_model_can_replace_the_folder_it_came_from(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    before = checkpoint.tensors["embed.weight"].read()
    checkpoint.save(folder, "native", overwrite=True)
    assert torch.equal(Checkpoint.open(folder).tensors["embed.weight"].read(), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nothing", "does not exist"),
        (lambda p: p, "holds no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(make, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(make(tmp_path))


def test_a_file_is_refused_with_the_folder_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load(folder / "model.safetensors")


def test_wrong_words_are_refused(tiny: Hybrid, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='gguf2' is unknown; known: native, hf"):
        save(tiny, tmp_path / "x", format="gguf2")
    with pytest.raises(ValueError, match="dtype='int4'.*known: auto, bfloat16"):
        load(folder, dtype="int4")
    with pytest.raises(ValueError, match="recipe='bf17'"):
        load(folder, recipe="bf17")
    with pytest.raises(ValueError, match="device='gpu'"):
        load(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            load(folder, device="cuda")
    with pytest.raises(CheckpointError, match="record no checksums"):
        Checkpoint.open(folder, verify=True)


def test_a_truncated_checkpoint_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="beyond the end of the file; it is truncated"):
        load(folder)


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_model() -> None:
    bench = Path(__file__).resolve().parents[2] / "bench" / "load.py"
    done = subprocess.run([sys.executable, bench, "0.6"], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "over size" in line)
    assert float(line.split()[-2]) < 1.1
