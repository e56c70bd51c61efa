import json

import numpy as np
import pytest

from plait.data.shards import Dataset
from plait.data.writer import ShardWriter


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", 500, eos_id=2, shard_tokens=30) as writer:
        for n in range(1, 13):
            writer.add([10 * n + i for i in range(n)], source="even" if n % 2 == 0 else "odd", licence="CC0")
    return tmp_path / "set"


def test_documents_come_back_from_several_shards(folder):
    dataset = Dataset.open(folder)
    assert dataset.n_documents == 12
    assert dataset.n_tokens == sum(range(1, 13)) + 12
    assert dataset.lengths.tolist() == [n + 1 for n in range(1, 13)]
    assert len(list(folder.glob("tokens-*.bin"))) == 3
    for n in range(1, 13):
        assert dataset.document(n - 1).tolist() == [*(10 * n + i for i in range(n)), 2]
    dataset.verify()


def test_the_record_names_sources_and_licences(folder):
    record = Dataset.open(folder).record
    assert record["sources"]["odd"] == {"documents": 6, "tokens": 42, "licences": ["CC0"]}
    assert (record["vocab_size"], record["eos_id"], record["dtype"]) == (500, 2, "uint16")


@pytest.mark.parametrize("index", [-1, 12])
def test_documents_that_are_not_there_are_refused(folder, index):
    with pytest.raises(IndexError, match=f"document {index} of 12"):
        Dataset.open(folder).document(index)


@pytest.mark.parametrize("file", ["tokens-00001.bin", "documents-00000.bin"])
@pytest.mark.parametrize("change", [-1, -8, 1, 8])
def test_a_truncated_or_grown_file_is_named(folder, file, change):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ValueError, match=f"{file} is truncated or foreign: .* bytes, expected {len(data)}"):
        Dataset.open(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tokens-00002.bin").unlink()
    with pytest.raises(ValueError, match="tokens-00002.bin is missing"):
        Dataset.open(folder)


def test_offsets_that_do_not_divide_the_tokens_are_named(folder):
    offsets = np.fromfile(folder / "documents-00000.bin", "<i8")
    offsets[2] = offsets[1]
    offsets.tofile(folder / "documents-00000.bin")
    with pytest.raises(ValueError, match="documents-00000.bin does not divide"):
        Dataset.open(folder)


def test_a_changed_token_is_found_by_verify(folder):
    data = bytearray((folder / "tokens-00001.bin").read_bytes())
    data[5] ^= 1
    (folder / "tokens-00001.bin").write_bytes(data)
    with pytest.raises(ValueError, match="tokens-00001.bin has changed"):
        Dataset.open(folder).verify()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("format", "other", "does not describe token shards"),
        ("version", 9, "version 9, this Plait reads 1"),
        ("dtype", "float32", "dtype = 'float32'"),
        ("shards", None, "shards is no list"),
        ("shards", [{"documents": "3", "tokens": 5}], "shard 0 has '3' documents"),
        ("tokens", 5, "says 5 tokens, the shards hold"),
    ],
)
def test_a_foreign_record_is_refused(folder, field, value, named):
    record = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError, match=named):
        Dataset.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_record_that_is_no_json_object_is_refused(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="dataset.json"):
        Dataset.open(folder)


def test_a_missing_dataset_says_what_was_meant(folder):
    folder.rename(folder.parent / "train")
    with pytest.raises(FileNotFoundError, match="did you mean .*train"):
        Dataset.open(folder.parent)
    with pytest.raises(FileNotFoundError, match="plait tokenize"):
        Dataset.open(folder)
