"""Makes a folder appear whole or not at all: it is filled aside and renamed."""

import errno
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from plait.formats.error import CheckpointError

log = logging.getLogger("plait.formats")

# what belongs to a model besides its config and its tensors
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


def carried(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint folder that go with the model into every format."""
    return tuple(folder / name for name in CARRIED if (folder / name).is_file())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, as a write to a full disk raises it, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def whole_folder(
    target: Path, *, overwrite: bool, replaces: Callable[[Path], bool], n_bytes: int = 0
) -> Iterator[Path]:
    """Give a new folder beside `target` to fill; it takes the target's place when the block ends without an error.

    Args:
        target: the folder to appear.
        overwrite: replace what is there already.
        replaces: tells whether a folder is one of those that may be replaced.
        n_bytes: room that it will need; checked before anything is written.

    Raises: CheckpointError if the target is there and may not be replaced; OSError as usual.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink():
        target = target.resolve()
    _check(target, overwrite, replaces)
    disk = shutil.disk_usage(next(folder for folder in target.parents if folder.exists()))
    if not disk.total:
        # /proc and its like
        raise CheckpointError(f"{target.parent} cannot hold files; choose a place on a disk")
    if disk.free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    tag = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    aside, old = (target.with_name(f".{target.name}.{tag}.{end}") for end in ("new", "old"))
    aside.mkdir()
    try:
        yield aside
        _sync(aside)
        if target.exists() and any(target.iterdir()):
            # a folder cannot be renamed over a full one; should the second rename fail, the first is undone
            os.rename(target, old)
            try:
                os.rename(aside, target)
            except OSError:
                os.rename(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.rename(aside, target)
        _sync(target.parent)
    except OSError as error:
        name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes, os.PathLike)) else aside
        if error.errno is None or aside not in name.parents:
            raise
        # say where the file was meant to be, not where it was built
        raise OSError(error.errno, error.strerror, str(target / name.relative_to(aside))) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_file(source: Path, folder: Path) -> None:
    """Copy a file's bytes (a link's target, not the link) and make sure that they are on the disk."""
    with naming(folder / source.name), source.open("rb") as read, (folder / source.name).open("xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
        write.flush()
        os.fsync(write.fileno())


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "machine"


def _sweep(target: Path) -> None:
    """Remove what killed processes of this machine left beside the target; what may be another's is only named."""
    shape = re.compile(
        rf"\.{re.escape(target.name)}\.(?:(?P<machine>[A-Za-z0-9]+)-(?P<pid>\d+)-)?[0-9a-f]{{8}}\.(new|old)"
    )
    for path in target.parent.iterdir():
        found = shape.fullmatch(path.name)
        if found is None or not path.is_dir() or path.is_symlink():
            continue
        ours = found["machine"] == _machine()
        if ours and psutil.pid_exists(int(found["pid"])):
            continue
        # between two renames the old folder is the only one there is
        if ours and (path.suffix == ".new" or target.exists()):
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed %s, which a stopped run left", path)
        else:
            log.warning("%s was left by another run; remove it if that run has stopped", path)


def _check(target: Path, overwrite: bool, replaces: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder, choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists and is not empty; choose another folder, or ask to replace it (overwrite, --force)"
        )
    if not replaces(target):
        raise CheckpointError(f"{target} is not empty and holds no checkpoint; it will not be replaced")


def _sync(folder: Path) -> None:
    # renames are only safe on disk once their folder is; not every system can open one
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EISDIR, errno.EPERM):
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
