"""Writing safetensors: other people's reader reads them equal, in one file and in many."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plait.formats import tensors
from plait.formats.error import CheckpointError
from plait.formats.safetensors import INDEX, SINGLE, open_folder
from plait.formats.shards import sha256_of, write_tensors
from plait.formats.tensors import LazyTensor

TENSORS = {
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "wide": torch.randn(4, 3),
    "none": torch.empty(0, 2),
    "scalar": torch.tensor(5, dtype=torch.int64),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
LAZY = {name: LazyTensor.of(t) for name, t in TENSORS.items()}


def test_one_file_is_read_equal_by_others(tmp_path: Path) -> None:
    written = write_tensors(tmp_path, LAZY)
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], t) for name, t in TENSORS.items())
    raw = (tmp_path / SINGLE).read_bytes()
    assert written[SINGLE].n_bytes == len(raw)
    assert written[SINGLE].sha256 == hashlib.sha256(raw).hexdigest() == sha256_of(tmp_path / SINGLE)


def test_every_tensor_is_aligned_to_its_numbers(tmp_path: Path) -> None:
    write_tensors(tmp_path, LAZY)
    raw = (tmp_path / SINGLE).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in TENSORS.items())


def test_shards_are_no_larger_than_asked_and_read_equal(tmp_path: Path) -> None:
    many = {f"t{i:02}": LazyTensor.of(torch.full((10,), float(i))) for i in range(20)}
    written = write_tensors(tmp_path, many, max_shard_bytes=120)
    shards = [name for name in written if name != INDEX]
    assert shards[0] == "model-00001-of-00007.safetensors" and len(shards) == 7
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 800
    found = open_folder(tmp_path)
    assert all(torch.equal(found[name].read(), lazy.read()) for name, lazy in many.items())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    parts = {name: LazyTensor.of(torch.zeros(n)) for name, n in (("a", 1), ("b", 100), ("c", 1))}
    assert len(write_tensors(tmp_path, parts, max_shard_bytes=10)) == 4


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 16)
    seen: list[int] = []
    write_tensors(tmp_path, LAZY, progress=seen.append)
    assert sum(seen) == sum(lazy.n_bytes for lazy in LAZY.values())
    assert max(seen) <= 16


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'x' is torch.complex64"):
        write_tensors(tmp_path, {"x": LazyTensor.of(torch.zeros(2, dtype=torch.complex64))})


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path, LAZY)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path, LAZY)
