"""The text of the story: what is read, what is left out, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest

from plait.cli.chapters.story import Text
from plait.cli.chapters.text import HELD_OUT, UNREAD, collect, divided, vocabulary_for
from plait.data.document import Document
from plait.data.prepare import is_valid

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


def test_what_an_earlier_demo_wrote_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "a.py").write_text(LINES)
    (tmp_path / "demo" / "report.html").write_text(LINES)
    assert collect(tmp_path, 1 << 20, without=tmp_path / "demo").n_files == 1


def of(texts: list[str]) -> Text:
    documents = [Document(text=text, source="") for text in texts]
    return Text(documents=documents, n_files=len(texts), total_bytes=0, skipped=Counter())


CANDIDATES = [f"text number {i}. " + LINES for i in range(400)]
HELD = [text for text in CANDIDATES if is_valid(text, HELD_OUT)]
KEPT = [text for text in CANDIDATES if not is_valid(text, HELD_OUT)]


def test_the_vocabulary_never_learns_from_what_chance_holds_out() -> None:
    text, read, said = divided(of([KEPT[0], HELD[0], KEPT[1], HELD[1]]))
    assert read == KEPT[:2] and len(text.documents) == 4 and "chosen by the hash" in said


@pytest.mark.parametrize("texts", [HELD[:3], HELD[:1], KEPT[:1]], ids=["all held out", "one held out", "one kept"])
def test_the_vocabulary_learns_only_from_half_of_a_document_whose_end_is_held_out(texts: list[str]) -> None:
    text, read, said = divided(of(texts))
    last = text.documents[-1].text
    assert read == [last[: (len(last) + 1) // 2]] and "first half" in said
    assert len(last) == max(map(len, texts)) and sorted(d.text for d in text.documents) == sorted(texts)


def test_the_vocabulary_learns_from_the_others_when_the_end_of_the_longest_is_held_out() -> None:
    longest = KEPT[0] * 2
    text, read, said = divided(of([longest, *KEPT[1:4]]))
    assert text.documents[-1].text == longest and read == KEPT[1:4] and said.endswith("from the other documents")
    text, read, said = divided(of([longest, KEPT[1]]))
    assert read == [KEPT[1], KEPT[0]] and "other documents and the first half" in said
