"""Reading safetensors: what others wrote reads equal, what is broken is refused by name."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.formats.error import CheckpointError
from plait.formats.safetensors import DTYPES, INDEX, SINGLE, files_of, open_file, open_folder
from plait.formats.tensors import LazyTensor

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_that_others_write_reads_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randint(0, 2, (3, 5)).to(dtype)
    save_file({"x": x}, tmp_path / "x.safetensors")
    read = open_file(tmp_path / "x.safetensors")["x"].read()
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), x.view(torch.uint8))


def test_tensors_that_are_not_aligned_read_right(tmp_path: Path, raw) -> None:
    x = torch.randn(4)
    data = b"\x07" + x.numpy().tobytes()
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    assert torch.equal(open_file(raw(tmp_path / "x", header, data))["x"].read(), x)


def test_empty_tensors_and_scalars_read(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 3), "one": torch.tensor(4.0)}, tmp_path / "x")
    found = open_file(tmp_path / "x")
    assert found["none"].read().shape == (0, 3)
    assert found["one"].read().item() == 4.0


def test_reading_twice_after_pages_are_given_back_is_equal(tmp_path: Path) -> None:
    x = torch.randn(5000)
    save_file({"x": x}, tmp_path / "x")
    lazy = open_file(tmp_path / "x")["x"]
    assert torch.equal(lazy.read(), x)
    assert torch.equal(lazy.read(), x)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{", b"", "not readable"),
        (b"[]", b"", "expected a table"),
        (b'{"x": 1, "x": 2}', b"", "'x' is in the header twice"),
        ({"x": {"dtype": "F32"}}, b"", "'x' lacks"),
        ({"x": F32 | {"dtype": "F13"}}, b"\0" * 8, "'x' has dtype 'F13'"),
        ({"x": F32 | {"shape": [-2]}}, b"\0" * 8, r"'x' has shape \[-2\]"),
        ({"x": F32 | {"shape": [True, 2]}}, b"\0" * 8, "'x' has shape"),
        ({"x": F32 | {"shape": "2"}}, b"\0" * 8, "'x' has shape"),
        ({"x": F32 | {"shape": [3]}}, b"\0" * 8, "needs 12 bytes"),
        ({"x": F32 | {"shape": [1 << 62, 1 << 62]}}, b"\0" * 8, "'x' of shape"),
        ({"x": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8, "'x' of shape"),
        ({"x": F32}, b"\0" * 7, "'x' ends 1 bytes beyond the end"),
        ({"x": F32}, b"\0" * 9, "1 bytes that no tensor claims"),
        ({"x": F32, "y": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12, "'y' overlaps"),
        ({"x": F32, "y": F32 | {"data_offsets": [9, 17]}}, b"\0" * 17, "'y' lies 1 bytes behind"),
    ],
)
def test_a_broken_file_is_refused_with_its_tensor(header: object, data: bytes, words: str, tmp_path: Path, raw) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_file(raw(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("n", (0, 3, 8, 30))
def test_a_truncated_header_is_refused(n: int, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:n])
    with pytest.raises(CheckpointError, match="truncated"):
        open_file(tmp_path / "x")


def test_no_damage_to_a_header_escapes_as_another_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, 2), "y": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "x")
    good = (tmp_path / "x").read_bytes()
    n, dice, refused = int.from_bytes(good[:8], "little"), random.Random(0), 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            bad[dice.randrange(8 + n)] = dice.choice(b'0123456789-[]{},:"\0\xffaE.')
        (tmp_path / "x").write_bytes(bad)
        try:
            for lazy in open_file(tmp_path / "x").values():
                lazy.read()
        except CheckpointError:
            refused += 1
    # a changed name or dtype of the same width is no damage that a reader can see
    assert refused > 400


def test_an_enormous_header_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((1 << 63).to_bytes(8, "little") + b"\0" * 100)
    with pytest.raises(CheckpointError, match="header should have"):
        open_file(tmp_path / "x")


def _shards(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


GOOD = {"a": "one.safetensors", "b": "two.safetensors"}


def test_shards_read_as_one(tmp_path: Path) -> None:
    _shards(tmp_path, GOOD)
    assert {name: t.shape for name, t in open_folder(tmp_path).items()} == {"a": (2,), "b": (3,)}
    assert files_of(tmp_path) == ["one.safetensors", "two.safetensors"]


def test_a_folder_of_links_reads_as_download_caches_have_it(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "8f2c")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to(blobs / "8f2c")
    assert torch.equal(open_folder(tmp_path / "snapshot")["a"].read(), torch.ones(2))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (GOOD | {"c": "three.safetensors"}, "three.safetensors is missing"),
        (GOOD | {"c": "one.safetensors"}, "1 tensors that its shards lack, first 'c'"),
        ({"a": "../one.safetensors"}, "only plain file names"),
        ({"a": "/etc/passwd"}, "only plain file names"),
        ({"a": 3}, "only plain file names"),
        ({}, "no table"),
        ([], "no table"),
    ],
)
def test_a_wrong_index_is_refused(weight_map: dict[str, str], words: str, tmp_path: Path) -> None:
    _shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=words):
        open_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    _shards(tmp_path, GOOD)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="'a' is also in another shard"):
        open_folder(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_folder(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_folder(tmp_path)


def test_the_file_is_never_changed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    lazy: LazyTensor = open_file(tmp_path / "x")["x"]
    for block in lazy.blocks():
        block.zero_()
    assert (tmp_path / "x").read_bytes() == before
