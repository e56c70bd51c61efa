import json
from collections import Counter

import pytest
import zstandard

from plait.data.document import Document, SourceError
from plait.data.sources import jsonl


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_texts_sources_and_licences_come_back(tmp_path):
    file = write(
        tmp_path / "a.jsonl", {"text": "é\n👩", "source": "wiki", "licence": "CC0"}, "", {"text": "b", "license": "MIT"}
    )
    assert list(jsonl.read(file, "text", Counter())) == [
        Document(text="é\n👩", source="wiki", licence="CC0"),
        Document(text="b", licence="MIT"),
    ]


def test_the_field_can_be_chosen(tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
    assert [document.text for document in jsonl.read(file, "body", Counter())] == ["yes"]


def test_the_shared_corpus_reads(shared):
    file = shared / "data/starter/valid.jsonl.zst"
    with file.open("rb") as stream:
        rows = [json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(stream).readall().splitlines()]
    found = list(jsonl.read(file, "text", Counter()))
    assert [document.text for document in found] == [row["text"] for row in rows]
    assert {document.source for document in found} == {row["source"] for row in rows}


def test_broken_lines_behind_good_ones_are_counted(tmp_path):
    rows = [{"text": "a"}, "{", "[" * 100_000, "[1]", {"body": "x"}, {"text": 3}, {"text": "b"}]
    skipped = Counter()
    found = jsonl.read(write(tmp_path / "a.jsonl", *rows), "text", skipped)
    assert [document.text for document in found] == ["a", "b"]
    assert skipped == {"bad JSON": 3, "no field 'text'": 1, "no text in 'text'": 1}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("not json", "first line of .*a.jsonl is no JSON"),
        ("[1]", "is a list; JSONL holds one object per line"),
        ({"body": "x", "id": 1}, "has no field 'text', only body, id; set --field"),
        ({"text": None}, "'text' is a NoneType"),
    ],
)
def test_a_file_whose_first_line_is_wrong_is_refused(tmp_path, row, named):
    with pytest.raises(SourceError, match=named):
        list(jsonl.read(write(tmp_path / "a.jsonl", row, {"text": "a"}), "text", Counter()))


def test_an_empty_file_is_counted(tmp_path):
    skipped = Counter()
    assert list(jsonl.read(write(tmp_path / "a.jsonl", ""), "text", skipped)) == []
    assert skipped == {"empty": 1}
