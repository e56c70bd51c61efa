"""Each kind of failure has its exit status and names the path and the fix."""

import errno
from pathlib import Path

import pytest

from plait.cli.failure import verdict
from plait.config import ConfigError
from plait.train.loop import DivergedError


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.ENOSPC, 1, "no space left for out/a; free some, or choose a place on another disk"),
        (errno.EROFS, 2, "out/a is on a read-only disk; choose another place"),
        (errno.EACCES, 2, "no permission for out/a; change its rights or choose another place"),
        (errno.EISDIR, 2, "out/a: is a directory; choose another place"),
        (errno.EFBIG, 1, "out/a would be larger than a file may be here; raise `ulimit -f`, or choose another disk"),
        (errno.EIO, 1, "out/a: input/output error"),
    ],
)
def test_a_failure_of_the_disk_names_the_path_and_the_fix(number: int, status: int, message: str) -> None:
    assert verdict(OSError(number, "Input/output error", "out/a")) == (status, message)


def test_a_failed_rename_names_the_place_that_was_meant() -> None:
    error = OSError(errno.ENOSPC, "No space", ".a.tmp", None, "a")
    assert "no space left for a;" in verdict(error)[1]


def test_a_misspelt_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "recpie.toml").read_text()
    status, message = verdict(caught.value)
    assert (status, message) == (
        2,
        f"{tmp_path}/recpie.toml does not exist; did you mean {tmp_path}/recipe.toml?",
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("lr = 'x': expected float"), 2, "lr = 'x': expected float"),
        (FileNotFoundError("no shards here"), 2, "no shards here"),
        (ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard"), 1, "pip install tensorboard"),
        (ModuleNotFoundError("No module named 'plait.x'", name="plait.x"), 1, "plait.x is not part of this build"),
        (MemoryError(), 1, "out of memory: an allocation failed; take a smaller batch"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
            ),
            1,
            "out of memory: 8.0 GiB more were asked for; take a smaller model, batch or context",
        ),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (DivergedError("diverged: the loss"), 3, "diverged: the loss"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_other_failures_say_what_to_do(error: Exception, status: int, message: str) -> None:
    found, words = verdict(error)
    assert found == status
    assert message in words and (message or not words)


def test_weights_that_are_not_numbers_are_told_in_one_sentence() -> None:
    assert verdict(FloatingPointError("the logits are not numbers")) == (1, "the logits are not numbers")
