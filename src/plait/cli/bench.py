"""`plait bench`: measure speed, correctness first, both sides alternated in one run."""

import importlib
from dataclasses import dataclass
from typing import Literal

from plait.cli.benches import BENCHES
from plait.cli.launch import arg
from plait.report import Report

EXAMPLE = "plait bench train --against transformers --precision bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to measure, and how often."""

    what: Literal["train"] = arg(help="what to measure", positional=True)
    against: Literal["", "transformers"] = arg(default="", help="measure this peer too, in turn")
    precision: Literal["bf16", "fp32", "both"] = arg(default="both", help="numbers to compute in")
    rounds: int = arg(default=5, help="counted runs of each side")
    threads: int = arg(default=0, help="processor threads, 0 for all")
    save: str = arg(default="", help="also write the report to this file, as JSON lines")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: give at least 1")


def run(inputs: Inputs) -> Report:
    """Measure it."""
    import torch

    from plait.cli.benches.sides import BenchSettings

    if inputs.threads:
        torch.set_num_threads(inputs.threads)
    module = importlib.import_module(BENCHES[inputs.what][0])
    report = module.measure(BenchSettings(against=inputs.against, precision=inputs.precision, rounds=inputs.rounds))
    if inputs.save:
        report.save_jsonl(inputs.save)
    return report
