"""One process at a time in the folder of a run."""

import errno
import logging
from pathlib import Path

import pytest
from tests.train.holder import held_elsewhere
from tests.train.tiny import objective, tiny_model

from plait.data.shards import Dataset
from plait.train import lock
from plait.train.lock import alone
from plait.train.loop import TrainConfig, train

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")


def test_a_folder_held_by_another_process_is_refused_until_that_is_killed(words: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held_elsewhere(out):
        with pytest.raises(ValueError, match="another process trains in .*run; .*--out"), alone(out):
            pass
        with pytest.raises(ValueError, match="another process"):
            train(tiny_model(), objective(words), TrainConfig(steps=1), out)
    with alone(out):
        pass


def test_the_process_that_holds_a_folder_may_take_it_again(tmp_path: Path) -> None:
    with alone(tmp_path), alone(tmp_path / "." / "x" / ".."):
        pass
    with alone(tmp_path / "y"):
        pass


def test_a_lock_is_kept_until_the_outer_block_ends(tmp_path: Path) -> None:
    with alone(tmp_path):
        with alone(tmp_path):
            pass
        with pytest.raises(AssertionError), held_elsewhere(tmp_path):
            pass


def test_a_disk_without_locks_is_only_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("plait.train.lock.fcntl.flock", none)
    with caplog.at_level(logging.WARNING), alone(tmp_path):
        assert "cannot be locked" in caplog.text


def test_a_full_disk_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space"), alone(tmp_path / "run"):
        pass
