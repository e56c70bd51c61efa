"""Holds the folder of a run, so that no two processes train in it at once.

The system itself lets go of the lock when a process ends, killed ones included; the empty file `.lock` stays.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    # Windows has no such locks
    fcntl = None

log = logging.getLogger(__name__)

_held: set[Path] = set()


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder of a run and hold it; a process that holds it may take it again.

    Raises: ValueError if another process trains in it or it cannot be written; OSError if the disk is full.
    """
    file = _open(out)
    with file:
        place = out.resolve()
        if place in _held:
            yield
            return
        _lock(file, out)
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


def _open(out: Path) -> IO[str]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return (out / ".lock").open("a", encoding="utf-8")
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"out={out}: it or a folder above it is a file; choose another folder with --out") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"out={out} cannot be written ({error.strerror}); choose another folder with --out") from None


def _lock(file: IO[str], out: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process trains in {out}; wait until it ends, stop it, or choose another folder with --out"
        ) from None
    except OSError as error:
        # some network disks have no locks
        log.warning("%s cannot be locked (%s); see that no other process trains in it", out, error.strerror)
