"""Measure everything about a GPU in one run: `bench/gpu.sh [--tiny] [--only PART,...] [--mamba FOLDER] [--json FILE]`.

Correctness first, then single kernels, then whole models. A part that fails is named in the report and the next one
runs; parts that would begin after the time is up are left out, and named too.
"""

import argparse
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import correct
import models
import operations
import torch
from clock import Bench
from setting import Setting, full, tiny

from plait.ops.dispatch import use
from plait.report import Report

Part = Callable[[], object]


def parts(bench: Bench, mamba: str) -> dict[str, Part]:
    """Every part by name, in order; the kernels' parts are forced onto Triton where there is no GPU."""
    drawn: dict[str, float] = {}

    def forced(part: Callable[[], object]) -> Part:
        def run() -> object:
            with nullcontext() if bench.setting.on_gpu else use("triton"):
                return part()

        return run

    def long_prompts(name: str) -> Part:
        return lambda: drawn.update({name: models.long_prompts(bench, name)})

    return {
        "limits": bench.limits,
        "correct": lambda: correct.check(bench),
        "scans": forced(lambda: operations.scans(bench, mamba)),
        "updates": forced(lambda: operations.updates(bench)),
        "streams": forced(lambda: operations.streams(bench)),
        "attention": forced(lambda: operations.attention(bench)),
        "head": forced(lambda: operations.head(bench)),
        "decode": lambda: models.decode_steps(bench),
        "training": lambda: models.training(bench),
        **{name: long_prompts(name) for name in bench.setting.models},
        "ratios": lambda: models.ratios(bench, drawn),
    }


def main() -> int:
    """Run the parts; returns how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--tiniest", action="store_true", help="the least of these: seconds")
    parser.add_argument("--only", default="", help="parts, separated by commas; limits are always measured")
    parser.add_argument("--mamba", default="", metavar="FOLDER", help="checkout of state-spaces/mamba to measure too")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part after so many minutes")
    parser.add_argument("--json", default="", metavar="FILE", help="where the report goes")
    args = parser.parse_args()
    small = args.tiny or args.tiniest
    if not small and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs the same at tiny sizes on the CPU")
    torch.manual_seed(0)
    setting: Setting = tiny(args.tiniest) if small else full()
    bench = Bench(setting, Report("GPU kernels and models" + (", tried at tiny sizes on a CPU" if small else "")))
    file = Path(args.json or ("build/gpu-tiny.jsonl" if small else "bench/results/gpu.jsonl"))
    begun, failed = time.monotonic(), 0
    wanted = {"limits", *args.only.split(",")} if args.only else None
    for name, part in parts(bench, args.mamba).items():
        if wanted is not None and name not in wanted:
            continue
        start = time.monotonic()
        if start - begun > 60 * args.minutes:
            bench.report.add(f"part {name}", "left out: the time was up")
            continue
        try:
            part()
        except Exception as problem:
            # one part that fails must not cost the others; what went wrong is shown and written down
            traceback.print_exc()
            bench.report.add(f"part {name}", f"FAILED: {type(problem).__name__}: {problem}"[:300])
            failed += 1
            models.free()
        bench.report.add(f"part {name}: took", time.monotonic() - start, "s")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        bench.report.save_jsonl(file)
    print(bench.report.table())
    print(f"wrote {file}")
    return failed + sum("NO" in str(fact.value) for fact in bench.report.facts if fact.name.startswith("correct: "))


if __name__ == "__main__":
    raise SystemExit(main())
