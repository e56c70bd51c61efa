"""Turns whatever stopped a verb into an exit status and one line that says the cause and the fix."""

import errno
import os
import re
import sys
from pathlib import Path

from plait.config import nearest

DONE, FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def verdict(error: BaseException) -> tuple[int, str]:
    """Judge a failure.

    Returns: the exit status, and the line to print, which is empty where nobody needs to be told.
    """
    words = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # the reader of our output left, as `head` does
        return FAILED, ""
    if isinstance(error, OSError) and error.errno:
        return _of_files(error)
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return BAD_INPUT, words or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        ours = error.name.partition(".")[0] == "plait"
        return FAILED, f"{error.name} is not part of this build" if ours else f"{words}; pip install {error.name}"
    # by name: importing the training loop would cost every verb a second
    if type(error).__name__ == "DivergedError":
        return DIVERGED, words
    # torch has its own class for a full GPU
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED, f"out of memory: {words or 'an allocation failed'}; take a smaller batch, context or model"
    # on the CPU it has none, only words
    if isinstance(error, RuntimeError) and ("can't allocate memory" in words or "alloc_cpu" in words):
        size = re.search(r"allocate (\d+) bytes", words)
        more = f"{int(size[1]) / 2**30:,.1f} GiB more were asked for" if size else "an allocation failed"
        return FAILED, f"out of memory: {more}; take a smaller model, batch or context, or a dtype of fewer bytes"
    if isinstance(error, FloatingPointError) and words:
        return FAILED, words
    return FAILED, f"{type(error).__name__}: {words} (PLAIT_TRACEBACK=1 shows where)"


def drop_unwritable_output() -> None:
    """Throw away buffered standard output that cannot be written, or Python would fail on it once more at exit."""
    # there is no standard output at all when it was closed before we started
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_files(error: OSError) -> tuple[int, str]:
    # a rename fails at its second path more often than at its first
    name = error.filename if error.filename2 is None else error.filename2
    path = "the output" if name is None else os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return FAILED, f"no space left for {path}; free some, or choose a place on another disk"
        case errno.EFBIG:
            return FAILED, f"{path} would be larger than a file may be here; raise `ulimit -f`, or choose another disk"
        case errno.EROFS:
            return BAD_INPUT, f"{path} is on a read-only disk; choose another place"
        case errno.EACCES | errno.EPERM:
            return BAD_INPUT, f"no permission for {path}; change its rights or choose another place"
        case errno.ENOENT:
            return BAD_INPUT, f"{path} does not exist; {_advice(Path(path))}"
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
            return BAD_INPUT, f"{path}: {os.strerror(error.errno).lower()}; choose another place"
    return FAILED, f"{path}: {(error.strerror or str(error)).lower()}"


def _advice(path: Path) -> str:
    folder = path.parent
    names = os.listdir(folder) if os.access(folder, os.R_OK) and folder.is_dir() else []
    close = nearest(path.name, names)
    return f"did you mean {folder / close}?" if close else "check the spelling"
