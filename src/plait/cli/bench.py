"""`plait bench`: measure speed, correctness first, all sides in turns within one run, beside the machine's limits."""

import importlib
from dataclasses import dataclass
from typing import Literal

from plait.cli.benches import BENCHES
from plait.cli.launch import arg
from plait.report import Report

EXAMPLE = "plait bench decode --model 290m --recipe bf16,int4 --depth 16,8192 --against transformers"
PEERS = ("transformers", "llama.cpp", "mamba_ssm", "fla")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to measure, on what, and how often."""

    what: Literal["ops", "train", "prefill", "decode", "twin", "device"] = arg(help="what to measure", positional=True)
    model: str = arg(default="", help="45m, 290m, twin, a preset or a checkpoint's folder; empty for the usual one")
    recipe: tuple[str, ...] = arg(default=(), help="numbers to compute in: bf16, fp32, int8, int4; empty for the usual")
    against: tuple[str, ...] = arg(default=(), help="peers to measure in turn: transformers, llama.cpp, mamba_ssm, fla")
    tokens: tuple[int, ...] = arg(default=(), help="prefill: lengths of the prompt; ops: tokens per call")
    depth: tuple[int, ...] = arg(default=(), help="decode: tokens in the cache before the first step")
    batch: int = arg(default=1, help="prefill and decode: sequences at a time")
    steps: int = arg(default=64, help="decode: tokens per sequence and round")
    rounds: int = arg(default=5, help="counted runs of each side")
    threads: int = arg(default=0, help="processor threads, 0 for all")
    binary: str = arg(default="", help="llama.cpp's llama-bench")
    gguf: str = arg(default="", help="folder of its models, from bench/peers/gguf_models.py")
    patience: float = arg(default=60.0, help="seconds that one run of a peer may take; longer ones are left out")
    tune: bool = arg(default=False, help="device: tune the Triton kernels at a model's sizes and keep what is fastest")
    chart: str = arg(default="", help="twin: also draw it into this SVG file")
    save: str = arg(default="", help="also write the report to this file, as JSON lines")

    def __post_init__(self) -> None:
        for field in ("rounds", "batch", "steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: give at least 1")
        if self.tune and self.what != "device":
            raise ValueError(f"--tune belongs to `plait bench device`, not to {self.what!r}")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: give at least 1, or 0 for all")
        for field, least in (("tokens", 1), ("depth", 0)):
            if any(n < least for n in getattr(self, field)):
                raise ValueError(f"{field}={getattr(self, field)}: give numbers of at least {least}")
        for peer in self.against:
            if peer not in PEERS:
                raise ValueError(f"against={peer!r} is no peer that we know; known: {', '.join(PEERS)}")
        if "llama.cpp" in self.against and not (self.binary and self.gguf):
            raise ValueError(
                "--against llama.cpp needs --binary LLAMA-BENCH and --gguf FOLDER, see bench/peers/README.md"
            )


def run(inputs: Inputs) -> Report:
    """Measure it."""
    import torch

    if inputs.threads:
        torch.set_num_threads(inputs.threads)
    report = importlib.import_module(BENCHES[inputs.what][0]).measure(inputs)
    if inputs.save:
        report.save_jsonl(inputs.save)
    return report
