"""Folders appear whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from plait.formats.error import CheckpointError
from plait.formats.folder import carried, copy_file, naming, whole_folder
from plait.formats.shards import write_text


def _fill(target: Path, word: str = "new", overwrite: bool = False, may_replace: bool = True) -> None:
    with whole_folder(target, overwrite=overwrite, replaces=lambda _: may_replace) as folder:
        (folder / "file").write_text(word)


def test_a_folder_appears_with_its_parents(tmp_path: Path) -> None:
    _fill(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    _fill(tmp_path / "x")
    assert (tmp_path / "x" / "file").exists()


def test_nothing_appears_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        with whole_folder(tmp_path / "x", overwrite=False, replaces=lambda _: True) as folder:
            (folder / "file").write_text("half")
            raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_full_folder_is_kept_unless_told(tmp_path: Path) -> None:
    _fill(tmp_path / "x", "old")
    with pytest.raises(CheckpointError, match="not empty"):
        _fill(tmp_path / "x")
    assert (tmp_path / "x" / "file").read_text() == "old"
    _fill(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    _fill(tmp_path / "x", "photos")
    with pytest.raises(CheckpointError, match="will not be replaced"):
        _fill(tmp_path / "x", overwrite=True, may_replace=False)
    assert (tmp_path / "x" / "file").read_text() == "photos"


def test_the_old_folder_survives_a_failure_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "x", "old")
    rename = os.rename

    def fails_for_new(source: Path, target: Path) -> None:
        if str(source).endswith(".new"):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_for_new)
    with pytest.raises(OSError, match="broken"):
        _fill(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        _fill(tmp_path / "x", overwrite=True)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total free")(100, 10))
    with pytest.raises(OSError) as caught:
        with whole_folder(tmp_path / "x", overwrite=False, replaces=lambda _: True, n_bytes=11):
            raise AssertionError("nothing may be written")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    _fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _fill(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_tokenizer_files_are_carried_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    (tmp_path / "notes.txt").write_text("no")
    (found,) = carried(tmp_path)
    (tmp_path / "to").mkdir()
    copy_file(found, tmp_path / "to")
    assert not (tmp_path / "to" / "tokenizer.json").is_symlink()
    assert (tmp_path / "to" / "tokenizer.json").read_text() == "{}"


def test_a_write_that_fails_names_the_file_where_it_was_meant_to_be(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        with whole_folder(tmp_path / "x", overwrite=False, replaces=lambda _: True) as folder:
            with naming(folder / "file"):
                raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x" / "file"))


def test_a_name_that_an_error_has_is_kept() -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(Path("b")):
        Path("a-file-that-is-not-there").read_text()
    assert caught.value.filename == "a-file-that-is-not-there"


@pytest.mark.parametrize("text", [False, True])
def test_every_writer_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bool) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "source").write_text("x")
    (tmp_path / "to").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "to" / "source", "x") if text else copy_file(tmp_path / "source", tmp_path / "to")
    assert caught.value.filename == str(tmp_path / "to" / "source")


def test_a_place_without_room_for_files_is_no_full_disk() -> None:
    with pytest.raises(CheckpointError, match="/proc cannot hold files; choose a place on a disk"):
        _fill(Path("/proc/x"))


def _dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with whole_folder(tmp_path / "x", overwrite=False, replaces=lambda _: True) as folder:
        machine = folder.name.split(".")[2].split("-")[0]
    gone = [f".x.{machine}-{_dead()}-0123abcd.new"]
    kept = {
        f".x.{machine}-{os.getppid()}-0123abcd.new",
        f".x.elsewhere-{_dead()}-0123abcd.new",
        ".x.0123abcd.new",
        f".y.{machine}-{_dead()}-0123abcd.new",
    }
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
    _fill(tmp_path / "x", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"x", *kept}
    assert ".x.0123abcd.new was left by another run" in caplog.text


def test_an_old_folder_stays_while_it_is_the_only_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "x", overwrite=False, replaces=lambda _: True) as folder:
        machine = folder.name.split(".")[2].split("-")[0]
    shutil.rmtree(tmp_path / "x")
    old = tmp_path / f".x.{machine}-{_dead()}-0123abcd.old"
    old.mkdir()
    _fill(tmp_path / "x")
    assert old.exists()
    _fill(tmp_path / "x", overwrite=True)
    assert not old.exists()
