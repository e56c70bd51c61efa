"""Makes a folder appear whole or not at all: it is filled aside and renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plait.formats.error import CheckpointError

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
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    tag = secrets.token_hex(4)
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
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_file(source: Path, folder: Path) -> None:
    """Copy a file's bytes (a link's target, not the link) and make sure that they are on the disk."""
    with source.open("rb") as read, (folder / source.name).open("xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
        write.flush()
        os.fsync(write.fileno())


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
