import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from plait.data.corpus import Corpus, find_files, kind_of
from plait.data.document import SourceError
from plait.data.sources import SOURCES


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("b/two.py", "a.txt", "b/one.md", ".hidden/x.txt", "__pycache__/y.py", "b/.z.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    (root / "picture.png").write_bytes(b"\x89PNG\x00")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    (root / "empty.txt").write_text("")
    (root / "rows.jsonl").write_text(json.dumps({"text": "row", "source": "own"}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["cell"]}), root / "table.parquet")
    return root


def test_every_kind_of_file_finds_its_source(tmp_path):
    names = ["a.txt", "a.py", "a", "a.JSONL", "a.jsonl.zst", "a.ndjson.gz", "a.parquet", "a.txt.zst", "jsonl"]
    kinds = [kind_of(tmp_path / name) for name in names]
    assert kinds == ["text", "text", "text", "jsonl", "jsonl", "jsonl", "parquet", "text", "text"]
    assert set(kinds) == set(SOURCES)


def test_a_tree_is_read_in_order_and_what_is_no_text_is_counted(tree):
    skipped = Counter()
    found = list(Corpus.of([tree]).read(skipped))
    assert [document.text for document in found] == [
        "text of a.txt",
        "row",
        "cell",
        "text of b/one.md",
        "text of b/two.py",
    ]
    assert [document.source for document in found] == ["tree", "own", "tree", "tree", "tree"]
    assert skipped == {"binary": 1, "undecodable": 1, "empty": 1}


def test_a_corpus_can_be_read_again(tree):
    corpus = Corpus.of([tree])
    assert list(corpus) == list(corpus)


def test_named_files_are_called_by_their_stem(tmp_path):
    file = tmp_path / "books.jsonl"
    file.write_text('{"text": "x"}')
    assert [document.source for document in Corpus.of([file])] == ["books"]


@pytest.mark.parametrize("name", ["picture.png", "latin.txt"])
def test_a_file_that_was_named_must_be_readable(tree, name):
    with pytest.raises(SourceError, match=name):
        list(Corpus.of([tree / name]))


def test_a_pipe_is_refused_when_named_and_passed_over_in_a_tree(tree):
    os.mkfifo(tree / "pipe.txt")
    assert tree / "pipe.txt" not in [file.path for file in find_files([tree])]
    with pytest.raises(ValueError, match="pipe.txt is neither a file nor a folder"):
        find_files([tree / "pipe.txt"])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt does not exist"):
        Corpus.of([tmp_path / "nothing.txt"])
    with pytest.raises(ValueError, match=f"no files under {tmp_path}; name files"):
        Corpus.of([tmp_path])
