"""What the machine can do: reading, copying, and matrix products in float32 and bfloat16; or, asked to, its tuning.

Saved with --save, it is a machine for `plait plan --device FILE` and `plait compress --device FILE`.
"""

import torch

from plait.cli.bench import Inputs
from plait.cli.benches import limits
from plait.cli.benches.sides import add_median, alternate
from plait.cli.machine import memory_bytes
from plait.report import Report, provenance

SIZES = (1024, 2048)


def measure(inputs: Inputs) -> Report:
    """Measure each limit in turn, with one thread and with all; or tune the kernels."""
    if inputs.tune:
        from plait.cli.benches import tune

        return tune.measure(inputs)
    report = Report("limits of this machine", provenance=provenance(seed=0))
    threads = torch.get_num_threads()
    report.add("threads", threads)
    at = "cuda" if torch.cuda.is_available() else "cpu"
    report.add("memory", torch.cuda.mem_get_info()[1] if at == "cuda" else memory_bytes()[1], "bytes")
    sides = {"read": limits.read(at), "copy": limits.copy(at)}
    for n in SIZES if at == "cpu" else (8192,):
        for dtype, name in ((torch.float32, "FP32"), (torch.bfloat16, "BF16")):
            sides[f"GEMM {n}^3 {name}"] = limits.gemm(dtype, n, at)
    counts = (1, threads) if threads > 1 and at == "cpu" else (threads,)
    named = {
        f"{name}, {count} thread{'s' * (count > 1)}" if at == "cpu" else name: limits.with_threads(count, side)
        for name, side in sides.items()
        for count in counts
    }
    for name, values in alternate(named, inputs.rounds, label="device").items():
        is_product = name.startswith("GEMM")
        add_median(report, name, [v / 1e9 for v in values], "GFLOP/s" if is_product else "GB/s")
    return report
