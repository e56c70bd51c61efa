"""The text of the story: what is read, what is left out, and what is refused."""

from pathlib import Path

import pytest

from plait.cli.chapters.text import UNREAD, collect, vocabulary_for

LINES = "def double(x):\n    return 2 * x\n" * 100


def test_the_standard_library_is_there_without_its_tests() -> None:
    text = collect(None, 1 << 17)
    assert text.n_files > 100 and 1 << 17 <= text.n_bytes < 1 << 20
    assert text.skipped["beyond what a demo needs"] > 0 and "test" in UNREAD


def test_the_same_files_are_taken_every_time() -> None:
    assert collect(None, 1 << 16).documents == collect(None, 1 << 16).documents


def test_binary_files_among_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(LINES)
    (tmp_path / "b.bin").write_bytes(b"\0\1\2" * 1000)
    text = collect(tmp_path, 1 << 20)
    assert [document.text for document in text.documents] == [LINES] and text.skipped == {"binary": 1}


@pytest.mark.parametrize("content", [None, b"\0\1\2" * 1000, b"short"], ids=["empty", "binary", "short"])
def test_a_folder_without_text_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"text in \d files.*give a folder") as error:
        collect(tmp_path, 1 << 20)
    assert tmp_path.name in str(error.value)


def test_small_texts_get_small_vocabularies() -> None:
    least = vocabulary_for(0, 4096)
    assert least == vocabulary_for(10_000, 4096) < vocabulary_for(400_000, 4096) < vocabulary_for(10**8, 4096) == 4096
