"""`plait demo`: what it refuses, and whose files it touches."""

from pathlib import Path

import pytest

from plait.cli.chapters import CHAPTERS
from plait.cli.chapters.story import OURS
from plait.cli.demo import MARK, prepare
from plait.cli.launch import launch


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert launch(["demo", "--out", str(tmp_path)]) == 2
    assert "other things" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_demo_replaces_only_what_a_demo_wrote(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    prepare(out)
    (out / "data").mkdir()
    (out / "data" / "old").write_text("")
    (out / "report.html").write_text("old")
    (out / "notes.txt").write_text("mine")
    prepare(out)
    assert {path.name for path in out.iterdir()} == {MARK, "notes.txt"}
    assert all("/" not in name for name in OURS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--minutes", "0"], "minutes=0"),
        (["--minutes", "nan"], "minutes"),
        (["--seed", "-1"], "seed=-1"),
        (["--text", "FOLDER"], "no text in 0 files"),
        (["--text", "no-such-folder"], "does not exist"),
        (["--out", "FILE"], "is a file"),
        (["--text", "FOLDER", "--out", "FOLDER"], "elsewhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    Path("FOLDER").mkdir()
    assert launch(["demo", *words]) == 2
    assert hint in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"FILE", "FOLDER"}


def test_the_story_begins_with_text_and_ends_with_what_next() -> None:
    assert list(CHAPTERS) == ["text", "train", "compare", "complete", "export", "bits", "compress", "onward"]


def test_bad_text_leaves_an_earlier_demo_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "demo"
    prepare(out)
    (out / "data").mkdir()
    for name in ("report.html", "data/old"):
        (out / name).write_text(name)

    def state() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in out.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    for words in (["--text", str(tmp_path / "empty")], ["--seed", "-1"]):
        assert launch(["demo", *words, "--out", str(out)]) == 2
        assert state() == before and len(before) == 3
