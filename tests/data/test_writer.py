import resource
import signal

import numpy as np
import pytest

from plait.data.shards import Dataset
from plait.data.writer import ShardWriter


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (65_536, 2), (65_537, 4), (200_000, 4)])
def test_the_vocabulary_decides_the_width(tmp_path, vocab_size, width):
    ids = [0, vocab_size - 1, 7]
    with ShardWriter(tmp_path / "set", vocab_size) as writer:
        writer.add(ids)
    assert (tmp_path / "set/tokens-00000.bin").stat().st_size == 3 * width
    assert Dataset.open(tmp_path / "set").document(0).tolist() == ids


def test_the_end_mark_is_put_once(tmp_path):
    with ShardWriter(tmp_path / "set", 10, eos_id=9) as writer:
        writer.add(np.array([1, 2], np.uint16))
        writer.add([1, 9])
    dataset = Dataset.open(tmp_path / "set")
    assert [dataset.document(i).tolist() for i in (0, 1)] == [[1, 2, 9], [1, 9]]


def test_nothing_bears_the_name_before_the_end(tmp_path):
    writer = ShardWriter(tmp_path / "set", 10)
    writer.add([1])
    assert not (tmp_path / "set").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="token id 10 is outside the vocabulary of 10"):
        with ShardWriter(tmp_path / "set", 10) as writer:
            writer.add([1])
            writer.add([10])
    assert not list(tmp_path.iterdir())


def test_an_empty_set_is_a_set(tmp_path):
    ShardWriter(tmp_path / "set", 10).close()
    dataset = Dataset.open(tmp_path / "set")
    assert (dataset.n_documents, dataset.n_tokens, dataset.lengths.tolist()) == (0, 0, [])


@pytest.mark.parametrize("ids", [[], [[1, 2]], [-1], [10]])
def test_documents_that_are_none_are_refused(tmp_path, ids):
    writer = ShardWriter(tmp_path / "set", 10)
    with pytest.raises(ValueError, match="document has shape|outside the vocabulary"):
        writer.add(ids)
    writer.drop()


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="set exists"):
        ShardWriter(tmp_path / "set", 10)


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 0}, {"vocab_size": 9, "eos_id": 9}, {"vocab_size": 9, "shard_tokens": 0}]
)
def test_impossible_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be at least 1|outside the vocabulary"):
        ShardWriter(tmp_path / "set", **wrong)


@pytest.mark.parametrize(("limit", "file"), [(300, "tokens-00000.bin"), (20, "documents-00000.bin")])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, limit, file):
    # a limit on the size of files stands for a full disk: the write fails, the opening does not
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    n = 100_000 if file.startswith("tokens") else 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(OSError) as caught, ShardWriter(tmp_path / "set", 10) as writer:
            for _ in range(5):
                writer.add([1] * n)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename.endswith(file)
    assert not list(tmp_path.iterdir())
