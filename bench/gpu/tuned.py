"""Tunes the Triton kernels before they are timed, for a minute: what is not reached keeps its default."""

from clock import Bench
from models import HYBRID

from plait.cli.benches.tune import tune_all

SECONDS = 60.0


def tune_kernels(bench: Bench) -> None:
    """Tune at the hybrid's sizes; winners are kept on disk, where the following parts find them."""
    s = bench.setting
    if s.on_gpu:
        tune_all(bench.report, s.models[HYBRID], tokens=(8192,), batches=s.updates, seconds=SECONDS)
    else:
        # nothing to be learned from the interpreter's times, and nothing is written: no candidate is faster
        even = lambda run: 1.0  # noqa: E731
        tune_all(
            bench.report, s.models[HYBRID], tokens=(9,), batches=(1,), device="cpu", timers=(even, even), keep=False
        )
