"""What this machine is and how fast it is: looked up where possible, measured in a fraction of a second where not."""

import functools
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from plait.train.metrics import peak_flops_per_s

# flags of /proc/cpuinfo that change which matrix kernels run, and what people call them
_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "VNNI",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "bf16": "BF16",
    "sve": "SVE",
}
# below this, bfloat16 products are not worth their rounding
WORTH = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """fp32, bf16: FLOP/s of a square matrix product. read: bytes/s of a large array."""

    fp32: float
    bf16: float
    read: float

    @property
    def has_fast_bf16(self) -> bool:
        """Whether bfloat16 pays."""
        return self.bf16 >= WORTH * self.fp32


@functools.cache
def speed(device: str = "cpu") -> Speed:
    """Measure GEMM peaks and read bandwidth, about half a second, once per process."""
    at = torch.device(device)
    return Speed(
        fp32=peak_flops_per_s(at, torch.float32),
        bf16=peak_flops_per_s(at, torch.bfloat16),
        read=_read_bytes_per_s(at),
    )


def _read_bytes_per_s(device: torch.device) -> float:
    # four times any cache of a common machine
    x = torch.ones(1 << 26, device=device)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        # the answer forces a wait for a GPU
        float(x.sum())
        best = min(best, time.perf_counter() - begin)
    return x.numel() * x.element_size() / best


def cpu_features() -> list[str]:
    """Instruction sets that matter for matrix products; on other systems than Linux what torch says."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        flags = set(found.group(1).split()) if found else set()
        if named := [name for flag, name in _FLAGS.items() if flag in flags]:
            return named
    return [torch.backends.cpu.get_cpu_capability()]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Memory that is available and that there is, a container's limit respected."""
    machine = psutil.virtual_memory()
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = min(machine.total, int(text)) if text.isdecimal() else machine.total
    return min(machine.available, total), total


def cxx_compiler() -> str | None:
    """Path of a C++ compiler, which torch.compile needs."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)


def is_crowded(threads: int, repeats: int = 40) -> bool:
    """Whether other programs keep the processors so busy that one thread is faster than `threads`.

    Threads of one operation wait for each other at its end. If one of them has lost its processor to another program,
    every small operation waits for the scheduler: a hundred times longer than it computes. Milliseconds where the
    processors are free, a few tenths of a second where not.
    """
    if threads < 2:
        return False
    before = torch.get_num_threads()
    x = torch.zeros(1 << 18)
    seconds = {}
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            # the first call wakes the threads
            x.add_(1.0)
            begin = time.perf_counter()
            for _ in range(repeats):
                x.add_(1.0)
            seconds[n] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(before)
    return seconds[threads] > 2 * seconds[1]


class Threads:
    """As many threads as pay at the moment: all of them, or one while other programs are busy. A context manager."""

    def __init__(self) -> None:
        self.all = torch.get_num_threads()
        self.was_crowded = False

    def choose(self) -> int:
        """Look and set; returns the number of threads."""
        crowded = is_crowded(self.all)
        self.was_crowded |= crowded
        torch.set_num_threads(1 if crowded else self.all)
        return torch.get_num_threads()

    def __enter__(self) -> "Threads":
        self.choose()
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.all)
