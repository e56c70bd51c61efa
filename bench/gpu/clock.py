"""Seconds on a GPU: a captured graph between two events, the cache flushed before each run; and a report's lines."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from setting import DATASHEETS, Setting
from torch import Tensor

from plait.model.plan import Machine
from plait.report import Report


@dataclass(slots=True)
class Bench:
    """What is measured, where it is written, and the machine's measured limits: bytes/s copied, FLOP/s multiplied.

    end: when the time is up, by time.monotonic().
    """

    setting: Setting
    report: Report
    bandwidth: float = 0.0
    peak: float = 0.0
    flush: Tensor | None = None
    end: float = float("inf")

    def seconds(self, run: Callable[[], object], *, captures: bool = True) -> list[float]:
        """Seconds of several runs, after some that do not count.

        Args:
            run: the work, on tensors that stay where they are.
            captures: replay it as a graph, so that launching is not measured; False for work that takes milliseconds.
        """
        if not self.setting.on_gpu:
            run()
            return [_wall(run) for _ in range(self.setting.rounds)]
        for _ in range(3):
            run()
        replay = _captured(run) if captures else run
        if self.flush is None:
            # larger than any cache; filling it also gives the host time to launch what is measured
            self.flush = torch.empty(1 << 29, dtype=torch.uint8, device=self.setting.device)
        found: list[float] = []
        begun = time.perf_counter()
        while len(found) < 3 or (
            len(found) < self.setting.rounds and time.perf_counter() - begun < self.setting.seconds
        ):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return found

    def add(self, name: str, seconds: list[float], *, flops: float = 0.0, n_bytes: float = 0.0) -> float:
        """Note a time and how near it is to what the machine's measured limits allow; returns the median seconds."""
        median = statistics.median(seconds)
        spread = statistics.stdev(seconds) * 1e6 if len(seconds) > 1 else None
        self.report.add(name, median * 1e6, "us", n=len(seconds), spread=spread)
        floor = max(flops / self.peak, n_bytes / self.bandwidth)
        if floor:
            self.report.add(f"{name}: floor by measured limits", floor * 1e6, "us")
            self.report.add(f"{name}: share of the floor reached", floor / median)
        return median

    def limits(self) -> None:
        """Measure copying and multiplying, before anything that is compared with them."""
        s = self.setting
        source = torch.empty(s.copied, dtype=torch.uint8, device=s.device).fill_(1)
        target = torch.empty_like(source)
        self.bandwidth = 2 * s.copied / statistics.median(self.seconds(lambda: target.copy_(source)))
        a, b = (torch.randn(s.square, s.square, device=s.device).to(s.dtype) for _ in range(2))
        self.peak = 2 * s.square**3 / statistics.median(self.seconds(lambda: a @ b))
        self.report.add("copy bandwidth", self.bandwidth / 1e9, "GB/s")
        self.report.add(f"GEMM peak, {s.square} cubed, {str(s.dtype)[6:]}", self.peak / 1e12, "TFLOP/s")

    def value(self, name: str) -> float | None:
        """A number that the report has by this name, from whatever part."""
        values = [fact.value for fact in self.report.facts if fact.name == name]
        return float(values[-1]) if values and isinstance(values[-1], (int, float)) else None

    def read_limits(self) -> None:
        """Take the measured limits from the report."""
        self.bandwidth = 1e9 * (self.value("copy bandwidth") or 1.0)
        peaks = (fact.value for fact in self.report.facts if fact.name.startswith("GEMM peak"))
        self.peak = 1e12 * next((peak for peak in peaks if isinstance(peak, float)), 1.0)

    @property
    def machine(self) -> Machine:
        """The datasheet's machine where the GPU is known, else the measured one; memory as it is."""
        if not self.setting.on_gpu:
            return Machine(memory=1 << 23, bandwidth=self.bandwidth, flops=self.peak)
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        for known, (_, bandwidth) in DATASHEETS.items():
            if known in name:
                # rooflines take what large products reach on this GPU, and the bandwidth that is printed
                return Machine(memory=memory, bandwidth=bandwidth, flops=self.peak)
        return Machine(memory=memory, bandwidth=self.bandwidth, flops=self.peak)

    @property
    def datasheet_flops(self) -> float:
        """The datasheet's bfloat16 FLOP/s, or the measured ones of an unknown device."""
        name = torch.cuda.get_device_name() if self.setting.on_gpu else ""
        return next((flops for known, (flops, _) in DATASHEETS.items() if known in name), self.peak)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        # what asks the GPU on its way cannot be captured: it is measured with its launches
        torch.cuda.synchronize()
        return run
    return graph.replay


def _wall(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
