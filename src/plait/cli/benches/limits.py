"""The machine's limits, measured as sides of a benchmark: reading, copying and multiplying as fast as it can.

Each call measures for a fraction of a second and returns the best of a few tries, in bytes/s or FLOP/s.
"""

import time
from collections.abc import Callable, Iterable

import torch

from plait.cli.benches.sides import Side

# far more than the caches of a common machine hold
ARRAY_BYTES = 1 << 28
GEMM_SIZE = 2048
# bytes of a tensor whose reading is no matter of starting and ending
LARGE = 1 << 20


def read(device: str = "cpu", n_bytes: int = ARRAY_BYTES) -> Side:
    """Bytes/s of reading a large array: its sum as whole numbers, which costs less than the memory."""
    # no two pages alike: a virtual machine's host may keep equal pages once, and then they come from its cache
    x = torch.arange(n_bytes // 8, dtype=torch.int64, device=device)
    return _rate(lambda: x.sum(), n_bytes, device)


def read_of(tensors: Iterable[torch.Tensor]) -> Side:
    """Bytes/s of reading these very tensors, on the CPU, once through: where memory lies may double its speed.

    Without a large one among them it is that of any large array.
    """
    large = [t for t in tensors if t.numel() * t.element_size() >= LARGE and t.is_contiguous()]
    if not large:
        return read()
    rows = [t.flatten().view(torch.uint8) for t in large]
    words = [t[: t.numel() // 8 * 8].view(torch.int64) for t in rows]
    return _rate(lambda: [t.sum() for t in words], sum(8 * t.numel() for t in words), "cpu")


def copy(device: str = "cpu", n_bytes: int = ARRAY_BYTES) -> Side:
    """Bytes/s of copying a large array, read and written bytes together."""
    x = torch.arange(n_bytes // 2 // 8, dtype=torch.int64, device=device)
    y = torch.empty_like(x)
    return _rate(lambda: y.copy_(x), n_bytes, device)


def gemm(dtype: torch.dtype, n: int = GEMM_SIZE, device: str = "cpu") -> Side:
    """FLOP/s of a square matrix product of side n."""
    generator = torch.Generator().manual_seed(0)
    # random numbers: zeros and ones draw less power, and a GPU then runs faster than it ever will
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(lambda: torch.mm(a, b, out=out), 2 * n**3, device)


def with_threads(n: int, side: Side) -> Side:
    """The same measurement with n threads."""

    def run() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            return side()
        finally:
            torch.set_num_threads(before)

    return run


def floor_s(n_bytes: float, flops: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Seconds that some work needs at least: its bytes or its FLOPs, whichever takes longer."""
    return max(n_bytes / bytes_per_s, flops / flops_per_s)


def _rate(run: Callable[[], object], amount: float, device: str, least_s: float = 0.15, tries: int = 3) -> Side:
    def side() -> float:
        best, begin, done = float("inf"), time.perf_counter(), 0
        while done < tries or time.perf_counter() - begin < least_s:
            start = time.perf_counter()
            run()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            done += 1
        return amount / best

    return side
