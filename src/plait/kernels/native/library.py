"""Find and call the compiled kernels: one library per source file and kind of processor, chosen as the program runs.

Every C function takes pointers, int64 and double only; `call` turns tensors, whole numbers and floats into these.
Libraries share PyTorch's own OpenMP threads, as both ask for the same libgomp.
"""

import ctypes
import functools
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
# kind of processor -> what PyTorch's own detection and the operating system must say of it, best first
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
AVX2 = ("avx2", "fma", "f16c")


@functools.cache
def target() -> str:
    """Which kind of library this processor can run: "avx512" (with BF16 and VNNI), "avx2", "neon", or "" for none."""
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return "neon"
    if machine not in ("x86_64", "AMD64"):
        return ""
    flags = _x86_flags()
    return next((name for name, needs in (("avx512", AVX512), ("avx2", AVX2)) if flags.issuperset(needs)), "")


def _x86_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        line = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        return frozenset(line.partition(":")[2].split())
    # elsewhere PyTorch knows AVX2 but not the newer extensions
    return frozenset(AVX2 if "AVX" in torch.backends.cpu.get_cpu_capability() else ())


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of NAME.cpp for this processor, or None where they were not compiled."""
    path = FOLDER / f"{name}_{target()}.so"
    try:
        return ctypes.CDLL(str(path)) if path.is_file() else None
    except OSError as error:
        # compiled for another system, or without what it links to
        warnings.warn(f"{error}; PyTorch serves instead, slower. Install Plait again to compile it", stacklevel=2)
        return None


@functools.cache
def _function(name: str, function: str) -> "ctypes._NamedFuncPointer":
    found = library(name)
    assert found is not None, f"{name} was not compiled for this processor"
    return getattr(found, function)


def call(name: str, function: str, *args: Tensor | int | float | None) -> None:
    """Call `function` of NAME.cpp; tensors go as pointers to their first element, None as a null pointer."""
    _function(name, function)(*map(_c_value, args))


def _c_value(x: Tensor | int | float | None) -> object:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if x is None:
        return None
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)


def serves(name: str, *tensors: Tensor | None) -> bool:
    """Whether NAME.cpp is compiled here and takes these tensors: on the CPU, float32 or bfloat16, not being traced."""
    return (
        all(t is None or (t.is_cpu and t.dtype in (torch.float32, torch.bfloat16)) for t in tensors)
        and not torch.compiler.is_compiling()
        and library(name) is not None
    )
