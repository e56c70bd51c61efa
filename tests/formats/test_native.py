"""Native folders hold any model bit by bit and notice damage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.formats.checkpoint import Checkpoint, load, save
from plait.formats.error import CheckpointError
from plait.model.hybrid import Hybrid, build
from plait.model.layers.mlp import MLP


@pytest.fixture
def folder(tiny: Hybrid, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "native", format="native")


def test_a_round_trip_is_bitwise(tiny: Hybrid, folder: Path) -> None:
    again = load(folder, device="cpu")
    assert again.config == tiny.config
    assert again.origin == folder
    assert all(torch.equal(again.state_dict()[name], t) for name, t in tiny.state_dict().items())


def test_layers_of_different_sizes_survive(tiny: Hybrid, tmp_path: Path) -> None:
    config = replace(tiny.config, layers=(*tiny.config.layers, MLP(d_ff=40)))
    save(build(config), tmp_path / "x", format="native")
    assert load(tmp_path / "x", device="cpu").config == config


def test_the_manifest_holds_a_checksum_of_every_other_file(folder: Path) -> None:
    manifest = json.loads((folder / "plait.json").read_text())
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"plait.json"}
    Checkpoint.open(folder, verify=True)


def test_a_flipped_bit_is_found_when_asked(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="model.safetensors was changed or damaged"):
        Checkpoint.open(folder, verify=True)


def test_a_truncated_file_is_found_at_once(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it was written with"):
        Checkpoint.open(folder)


def test_a_missing_file_is_found_at_once(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2, this Plait reads 1"),
        ({"config": {"vocab_sise": 3}}, "vocab_size"),
        ({"config": None}, "not readable"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "only plain file names"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: dict[str, object], words: str) -> None:
    path = folder / "plait.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)


def test_an_unreadable_manifest_is_refused(folder: Path) -> None:
    (folder / "plait.json").write_text("{")
    with pytest.raises(CheckpointError, match="plait.json is not readable"):
        Checkpoint.open(folder)


def test_provenance_names_the_parent(folder: Path, tmp_path: Path) -> None:
    Checkpoint.open(folder).save(tmp_path / "child", "native")
    provenance = Checkpoint.open(tmp_path / "child").provenance
    assert provenance["format"] == "native"
    parent = provenance["parent"]
    assert isinstance(parent, dict) and parent["name"] == "native"
    assert len(parent["files"]["model.safetensors"]["sha256"]) == 64


def test_damage_is_found_by_whatever_reads_the_tensors(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="model.safetensors was changed or damaged.*; copy it again"):
        load(folder, device="cpu")
    with pytest.raises(CheckpointError, match="model.safetensors was changed or damaged"):
        Checkpoint.open(folder).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    load(folder, device="cpu", verify=False)
    Checkpoint.open(folder).save(tmp_path / "x", verify=False)
