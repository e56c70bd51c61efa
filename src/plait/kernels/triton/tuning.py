"""How a kernel's block sizes and warps are chosen: good defaults, overridden by what was measured on this GPU.

`config("rms_norm", D=4096)` is that kernel's row of DEFAULTS, unless this GPU, with this Triton, was measured at this
class of shapes before (each number rounded up to a power of two). `tune` measures; the winners are kept in a small JSON
file in the user's cache directory, one per GPU model and Triton version: nothing is searched while a model runs.

A kernel takes its row as keywords: `kernel[grid](x, ..., **config("rms_norm", D=D))`.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
import triton
from triton.errors import TritonError

Config = dict[str, int]

# fused multiply-adds are faster and round once; from Triton 3.10 on they must be asked for, and 3.9 warns till they are
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# kernel -> its keywords: upper case are the kernel's own constants, the others are Triton's.
# each kernel's file adds its rows
DEFAULTS: dict[str, Config] = {}

# set while `tune` tries a candidate: kernel, candidate, and the shape classes that asked for it.
# a plain global, not a context variable: backward passes run in a thread of their own
_trial: tuple[str, Config, set[str]] | None = None


@torch.compiler.assume_constant_result
def config(kernel: str, **shape: int) -> Config:
    """The keywords to launch a kernel with.

    Args:
        kernel: a row of DEFAULTS.
        shape: the sizes that the best choice depends on, by name.

    Returns: a dictionary for the launch; do not change it.
    """
    if _trial is not None and _trial[0] == kernel:
        _trial[2].add(_shape_class(kernel, shape))
        return _trial[1]
    if not torch.cuda.is_available():
        return DEFAULTS[kernel]
    return _choose(kernel, torch.cuda.current_device(), tuple(shape.items()))


def _milliseconds(run: Callable[[], object]) -> float:
    time = triton.testing.do_bench(run, return_mode="median")
    return cast(float, time)


def tune(
    kernel: str, candidates: Iterable[Config], run: Callable[[], object], *, timer: Callable[..., float] = _milliseconds
) -> Config:
    """Time each candidate on this GPU and keep the fastest for the shape classes that `run` uses.

    Args:
        kernel: a row of DEFAULTS.
        candidates: keywords to try, with the names of that row; the row itself is tried first.
        run: calls the operation, which asks `config` for the kernel's keywords.
        timer: takes `run`, returns its time; by default the median on the GPU.

    Returns: the fastest. Candidates that do not compile or fit are passed over.
    Raises: ValueError if a candidate has other names, `run` never launches the kernel, or nothing runs.
    """
    global _trial
    best: tuple[float, Config] | None = None
    classes: set[str] = set()
    for candidate in [DEFAULTS[kernel], *candidates]:
        if candidate.keys() != DEFAULTS[kernel].keys():
            raise ValueError(f"candidate {candidate} of {kernel}: needs the names {', '.join(DEFAULTS[kernel])}")
        _trial = (kernel, candidate, classes)
        try:
            time = timer(run)
        except TritonError:
            continue
        finally:
            _trial = None
        if best is None or time < best[0]:
            best = (time, candidate)
    if not classes:
        raise ValueError(f"run never asks for the configuration of {kernel!r}; give the operation that launches it")
    if best is None:
        raise ValueError(f"no candidate for {kernel!r} compiles and fits on {_gpu()}")
    _store(dict.fromkeys(sorted(classes), best[1]))
    return best[1]


def _shape_class(kernel: str, shape: dict[str, int]) -> str:
    sizes = (f"{name}={triton.next_power_of_2(size) if size > 0 else size}" for name, size in sorted(shape.items()))
    return " ".join([kernel, *sizes])


@functools.cache
def _choose(kernel: str, device: int, shape: tuple[tuple[str, int], ...]) -> Config:
    found = _measured(_path()).get(_shape_class(kernel, dict(shape)), {})
    # a row kept by an older Plait may have other names
    return found if found.keys() == DEFAULTS[kernel].keys() else DEFAULTS[kernel]


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _path() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{_gpu()} triton {triton.__version__}")
    return home / "plait" / "tuning" / f"{name}.json"


@functools.cache
def _measured(path: Path) -> dict[str, Config]:
    """What the file holds; nothing, with a warning, if it cannot be read or is no such table."""
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or not all(_is_config(row) for row in table.values()):
            raise ValueError("not a table of whole numbers")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring tuned configurations in {path}: {error}; delete it to tune again", stacklevel=2)
        return {}
    return table


def _is_config(row: object) -> bool:
    return isinstance(row, dict) and all(type(value) is int for value in row.values())


def _store(found: dict[str, Config]) -> None:
    """Add rows to this GPU's file: read again (another process may have written), write aside, rename."""
    path = _path()
    _measured.cache_clear()
    table = {**_measured(path), **found}
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        os.replace(aside, path)
    except OSError as error:
        warnings.warn(f"the tuned configuration is lost: cannot write {path} ({error})", stacklevel=3)
    _choose.cache_clear()
    _measured.cache_clear()
