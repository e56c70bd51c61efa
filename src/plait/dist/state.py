"""Writes and reads the state that a run resumes from: tensors as safetensors, the rest as JSON, never a pickle.

The last file of a state, `complete.json`, lists every other file of its folder with its size and SHA-256. A folder
without a fitting one is not a state.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MARKER = "complete.json"
FACTS = "state.json"


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]) -> None:
    """Fill a folder with a state; what lies in it already becomes part of it.

    Args:
        folder: exists; it should get its final name only afterwards.
        tensors: file stem -> name -> tensor, on any device.
        facts: JSON-ready.

    Raises: OSError naming the file if the disk is full or not writable.
    """
    _write_json(folder / FACTS, facts)
    for stem, named in tensors.items():
        _write_tensors(folder / f"{stem}.safetensors", named)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    _write_json(folder / MARKER, {path.relative_to(folder).as_posix(): _print_of(path) for path in files})


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """Read a state back after comparing every checksum.

    Returns: tensors by file stem and name, on the CPU; facts. Folders inside are checked and not read.
    Raises: ValueError naming the folder and what is wrong with it.
    """
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            if _print_of(folder / name) != expected:
                raise ValueError(f"{folder / name} is damaged: its checksum is not the one written with it")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        here = [name for name in listed if name.endswith(".safetensors") and "/" not in name]
        found = {Path(name).stem: _read_tensors(folder / name) for name in here}
    except (OSError, SafetensorError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{folder} is no complete state: {error}") from None
    return found, facts


def facts(folder: Path) -> dict[str, object] | None:
    """The facts of a folder that looks complete (all files there, with their sizes), or None; reads no tensor."""
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, (size, _) in listed.items()):
            return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, TypeError):
        # whatever is wrong with it, it is not a state
        return None
    return None


def is_whole(folder: Path) -> bool:
    """Whether a folder is a state whose every checksum fits; reads all of it."""
    try:
        read(folder)
    except ValueError:
        return False
    return True


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators: the CPU's, and the device's where it has one."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; a state of a device that is not here is left out."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        # the library speaks of the disk in words only
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            if f"os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from None
        raise
    # the library's files are the owner's alone, ours are as the user's settings say
    shutil.copymode(path.with_name(FACTS), path)
    _sync(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write_json(path: Path, data: object) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
    except OSError as error:
        # a failed write does not know its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    _sync(path)


def _print_of(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    # a name that survives a power cut must not point at data that did not
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
