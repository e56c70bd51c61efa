import gzip
from collections import Counter

import pytest
import zstandard

from plait.data.document import SourceError
from plait.data.sources import text

WORDS = "Grüße 混合 👩‍👩‍👧‍👦\r\n\tindented\n\n"


def texts(path, skipped=None):
    return [document.text for document in text.read(path, "text", Counter() if skipped is None else skipped)]


@pytest.mark.parametrize("pack", [None, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_texts_come_back_unchanged(tmp_path, pack):
    file = tmp_path / {None: "a.md", gzip.compress: "a.md.gz", zstandard.compress: "a.md.zst"}[pack]
    file.write_bytes(pack(WORDS.encode()) if pack else WORDS.encode())
    assert texts(file) == [WORDS]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize("line", ["eleven char\n", "混", "no line end at all "])
def test_large_files_come_in_pieces_that_join_to_the_whole(tmp_path, monkeypatch, line):
    monkeypatch.setattr(text, "_PIECE", 1000)
    whole = line * 1500
    (tmp_path / "a.txt").write_text(whole)
    pieces = texts(tmp_path / "a.txt")
    assert len(pieces) > 2
    assert "".join(pieces) == whole


def test_a_binary_file_is_named_with_the_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(SourceError, match=r"a.txt is binary \(a zero byte at 8\)") as caught:
        texts(tmp_path / "a.txt")
    assert caught.value.reason == "binary"


@pytest.mark.parametrize(
    ("data", "place", "byte"),
    [
        (b"abc\xff", 3, "ff"),
        (b"a" * 1999 + b"\xe6(", 1999, "e6"),
        (b"a" * 3001 + b"\xe6\xb7", 3001, "e6"),
        (b"\n" * 2500 + b"\xc3(", 2500, "c3"),
    ],
)
def test_bytes_that_are_no_utf8_are_named_with_the_place(tmp_path, monkeypatch, data, place, byte):
    monkeypatch.setattr(text, "_PIECE", 1000)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(SourceError, match=f"a.txt is not UTF-8 .byte 0x{byte} at {place}"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("data", [b"", b" \n\t "])
def test_an_empty_file_is_counted(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    skipped = Counter()
    assert texts(tmp_path / "a.txt", skipped) == []
    assert skipped == {"empty": 1}
