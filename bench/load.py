"""Measure how much memory loading a checkpoint needs: `python bench/load.py [gigabytes] [--json FILE]`.

The figure is the peak resident growth over imports of a fresh process, for bfloat16 weights kept in bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.formats import FORMATS
from plait.formats.format import Contents
from plait.formats.rules import shapes_of
from plait.formats.tensors import LazyTensor, Run
from plait.model.config import ModelConfig
from plait.report import Report

WORKER = """
import json, resource, sys, time
import psutil
import torch, plait
from plait.formats.checkpoint import load
torch.empty(1).sum()
# the counter counts KiB on Linux and bytes on a Mac
unit = 1 if sys.platform == "darwin" else 1024
# from what is resident now, which is less than the peak of the imports: the stricter figure
before = psutil.Process().memory_info().rss
start = time.perf_counter()
model = load(sys.argv[1], device="cpu")
seconds = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(json.dumps({"growth": after - before, "held": held, "seconds": seconds}))
"""


@dataclass(frozen=True, slots=True)
class Noise:
    """A source of random numbers that takes no memory."""

    def read(self, start: int, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.bfloat16).uniform_(-0.02, 0.02)

    def drop(self, start: int, count: int) -> None:
        pass


def write_checkpoint(folder: Path, n_bytes: int) -> None:
    """A bfloat16 hybrid of about this size, with a large vocabulary as real ones have."""

    def config(n_blocks: int) -> ModelConfig:
        return ModelConfig.from_pattern(
            "M-M*-" * n_blocks,
            vocab_size=131072,
            d_model=1024,
            mamba2={"n_heads": 32, "head_dim": 64, "d_state": 128},
            attention={"n_heads": 16, "n_kv_heads": 4, "head_dim": 64},
            mlp={"d_ff": 4096},
        )

    one = config(2).cost().params - config(1).cost().params
    n_blocks = max(1, round((n_bytes / 2 - config(1).cost().params) / one) + 1)
    tensors = {}
    for name, shape in shapes_of(config(n_blocks)).items():
        count = torch.Size(shape).numel()
        tensors[name] = LazyTensor(shape=shape, dtype=torch.bfloat16, runs=(Run(Noise(), 0, count),))
    contents = Contents(config=config(n_blocks), tensors=tensors, provenance={})
    row = FORMATS["hf"]
    row.write(contents, row.plan(contents), folder, 1 << 30, None)


def measure(folder: Path) -> dict[str, float]:
    """Load in a fresh process: bytes of growth and of the model, and seconds."""
    done = subprocess.run([sys.executable, "-c", WORKER, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gigabytes", nargs="?", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="also write the report as JSON lines")
    given = parser.parse_args()
    report = Report("loading a bfloat16 checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_checkpoint(Path(folder), int(given.gigabytes * 1e9))
        report.add("write", time.perf_counter() - start, "s")
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        found = measure(Path(folder))
    report.add("checkpoint", size, "bytes")
    report.add("peak growth", found["growth"], "bytes")
    report.add("peak growth over size", found["growth"] / size, "x")
    report.add("load", found["seconds"], "s")
    report.add("load speed", size / found["seconds"] / 1e9, "GB/s")
    print(report.table())
    if given.json:
        report.save_jsonl(given.json)


if __name__ == "__main__":
    main()
