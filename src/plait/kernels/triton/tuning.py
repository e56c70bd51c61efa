"""How a kernel's block sizes and warps are chosen: good defaults, overridden by what was measured on this GPU.

`config("rms_norm", D=4096)` is that kernel's row of DEFAULTS, unless this GPU, with this Triton, was measured at this
class of shapes before (each number rounded up to a power of two). `tune` measures, one keyword after the other; the
winners are kept in a small JSON file in the user's cache directory, one per GPU model and Triton version: nothing is
searched while a model runs. `plait bench device --tune` tunes all kernels at the sizes of a model.

A kernel takes its row as keywords: `kernel[grid](x, ..., **config("rms_norm", D=D))`.
"""

import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

# a candidate must be faster than the default by so much to be kept: less is noise
LEAST_GAIN = 0.02

# set while `tune` tries a candidate: kernel and candidate; and, while somebody wants to know, the kernels that ask for
# their keywords and the shape classes they ask for.
# plain globals, not context variables: backward passes run in a thread of their own
_trial: tuple[str, Config] | None = None
_asked: dict[str, set[str]] | None = None


@torch.compiler.assume_constant_result
def config(kernel: str, **shape: int) -> Config:
    """The keywords to launch a kernel with.

    Args:
        kernel: a row of DEFAULTS.
        shape: the sizes that the best choice depends on, by name.

    Returns: a dictionary for the launch; do not change it.
    """
    if _asked is not None:
        _asked.setdefault(kernel, set()).add(_shape_class(kernel, shape))
    if _trial is not None and _trial[0] == kernel:
        return _trial[1]
    if not torch.cuda.is_available():
        return DEFAULTS[kernel]
    return _choose(kernel, torch.cuda.current_device(), tuple(shape.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning one kernel found: keywords, and milliseconds with the default's (inf if it fails) and with these."""

    kernel: str
    classes: tuple[str, ...]
    config: Config
    default_ms: float
    best_ms: float


def launched(run: Callable[[], object]) -> float:
    """Milliseconds of `run`, the median on the GPU with a cold cache."""
    time = triton.testing.do_bench(run, return_mode="median")
    return cast(float, time)


def replayed(run: Callable[[], object]) -> float:
    """As `launched`, of a captured graph: for work that takes less time than its launches."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return launched(graph.replay)


def asked(run: Callable[[], object]) -> dict[str, tuple[str, ...]]:
    """The kernels that `run` launches by their table's rows, and the shape classes it launches each with."""
    global _asked
    _asked = {}
    try:
        # a default that does not fit has asked before it fails
        with contextlib.suppress(TritonError):
            run()
        return {kernel: tuple(sorted(classes)) for kernel, classes in _asked.items()}
    finally:
        _asked = None


def tune(
    kernel: str,
    values: Mapping[str, Sequence[int]],
    run: Callable[[], object],
    *,
    classes: Sequence[str] = (),
    keep: bool = True,
    timer: Callable[[Callable[[], object]], float] = launched,
) -> Tuned:
    """Time a kernel's keywords on this GPU, one after the other, and keep the fastest for the classes `run` uses.

    Args:
        kernel: a row of DEFAULTS, from which the search begins.
        values: keyword -> what to try; with every keyword the best values of those before it.
        run: calls the operation, which asks `config` for the kernel's keywords.
        classes: those that `asked(run)` found; by default they are asked for here.
        keep: write it to the cache on disk.
        timer: takes `run`, returns its time.

    Returns: the fastest, and its time beside the default's. What does not compile or fit is passed over.
    Raises: ValueError for a keyword that the kernel lacks, if `run` never launches the kernel, or nothing runs.
    """
    default = DEFAULTS[kernel]
    for name in values:
        if name not in default:
            raise ValueError(f"{kernel} has no keyword {name!r} to try; it has {', '.join(default)}")
    classes = tuple(classes) or asked(run).get(kernel, ())
    if not classes:
        raise ValueError(f"run never asks for the configuration of {kernel!r}; give the operation that launches it")
    default_ms = _timed(kernel, default, run, timer)
    best, best_ms = default, default_ms
    for name, choices in values.items():
        base = best
        for value in choices:
            if value != base[name]:
                candidate = base | {name: value}
                time = _timed(kernel, candidate, run, timer)
                if time < best_ms * (1 - LEAST_GAIN if best is default else 1):
                    best, best_ms = candidate, time
    if math.isinf(best_ms):
        raise ValueError(f"no candidate for {kernel!r} compiles and fits on {gpu_name()}")
    if keep:
        _store(dict.fromkeys(classes, best))
    return Tuned(kernel=kernel, classes=classes, config=best, default_ms=default_ms, best_ms=best_ms)


def _timed(
    kernel: str, candidate: Config, run: Callable[[], object], timer: Callable[[Callable[[], object]], float]
) -> float:
    global _trial
    _trial = (kernel, candidate)
    try:
        return timer(run)
    except TritonError:
        return math.inf
    except RuntimeError:
        # the compiler's passes fail with these too; of the default it is a fault to be seen
        if candidate is DEFAULTS[kernel]:
            raise
        return math.inf
    finally:
        _trial = None


def _shape_class(kernel: str, shape: dict[str, int]) -> str:
    sizes = (f"{name}={triton.next_power_of_2(size) if size > 0 else size}" for name, size in sorted(shape.items()))
    return " ".join([kernel, *sizes])


@functools.cache
def _choose(kernel: str, device: int, shape: tuple[tuple[str, int], ...]) -> Config:
    found = _measured(cache_file()).get(_shape_class(kernel, dict(shape)), {})
    # a row kept by an older Plait may have other names
    return found if found.keys() == DEFAULTS[kernel].keys() else DEFAULTS[kernel]


def gpu_name() -> str:
    """What the cache on disk is kept for."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def cache_file() -> Path:
    """Where this GPU's winners are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu_name()} triton {triton.__version__}")
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
    path = cache_file()
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
