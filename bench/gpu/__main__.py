"""Measure everything about a GPU in one run: `bench/gpu.sh [--tiny] [--only PART,...] [--mamba FOLDER] [--json FILE]`.

Correctness first, then single kernels, whole models, and last what peers need (theirs tune themselves for long). Each
part runs in a process of its own, which sends every figure as it is found: one that crashes, or hangs, is named in the
report, keeps what it had found, and the next one runs. Parts that would begin after the time is up are named too.
"""

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

# whether there is a GPU is asked without waking it: a process that has cannot fork
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import correct
import models
import operations
import torch
from clock import Bench
from setting import Setting, full, tiny
from tuned import tune_kernels

from plait.ops.dispatch import use
from plait.report import Fact, Report, provenance

Part = Callable[[Bench], object]
# what a part may take beyond the end, so that the whole stays under ten minutes
GRACE_S = 40.0


def parts(names: list[str], mamba: str) -> dict[str, Part]:
    """Every part by name, in order; the kernels' parts are forced onto Triton where there is no GPU."""

    def forced(part: Part) -> Part:
        def run(bench: Bench) -> object:
            with nullcontext() if bench.setting.on_gpu else use("triton"):
                return part(bench)

        return run

    return {
        "limits": lambda bench: bench.limits(),
        "correct": correct.check,
        "tune": forced(tune_kernels),
        "scans": forced(operations.scans),
        "updates": forced(operations.updates),
        "streams": forced(operations.streams),
        "attention": forced(operations.attention),
        "head": forced(operations.head),
        "decode": models.decode_steps,
        "training": models.training,
        **{name: lambda bench, name=name: models.long_prompts(bench, name) for name in names},
        "ratios": models.ratios,
        "peers": forced(lambda bench: operations.peer_scans(bench, mamba)),
    }


class Sent(Report):
    """A report that also sends each fact through a pipe as it comes."""

    pipe: Connection | None = None

    def add(self, *args: object, **kwargs: object) -> None:
        """As Report.add."""
        super().add(*args, **kwargs)  # type: ignore[arg-type]
        if self.pipe is not None:
            self.pipe.send(self.facts[-1])


def alone(part: Part, bench: Bench, seconds: float) -> str:
    """Run a part in a process of its own, its facts into the report; returns what went wrong, or nothing.

    Args:
        part: forgets everything else at its end.
        bench: whose report it sees and extends.
        seconds: after which it is ended.
    """
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(part, bench, its), daemon=True)
    process.start()
    its.close()
    end, problem = time.monotonic() + seconds, ""
    while mine.poll(max(0.0, end - time.monotonic())):
        try:
            found = mine.recv()
        except EOFError:
            break
        if isinstance(found, Fact):
            bench.report.facts.append(found)
        elif isinstance(found, dict):
            bench.report.provenance = found
        else:
            problem = str(found)
    else:
        problem = f"ended after {seconds:.0f} s"
        process.kill()
    process.join()
    if not problem and process.exitcode:
        problem = f"the process ended with {process.exitcode}"
    return problem


def _run(part: Part, bench: Bench, pipe: Connection) -> None:
    torch.manual_seed(0)
    report = Sent(bench.report.title, list(bench.report.facts), bench.report.provenance)
    report.pipe, bench.report = pipe, report
    try:
        if not report.provenance:
            pipe.send(provenance())
        part(bench)
    except Exception as problem:
        # what went wrong is shown here and named in the report
        traceback.print_exc()
        pipe.send(f"{type(problem).__name__}: {problem}"[:300])
    pipe.close()


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
    setting: Setting = tiny(args.tiniest) if small else full()
    begun = time.monotonic()
    end = begun + 60 * args.minutes
    title = "GPU kernels and models" + (", tried at tiny sizes on a CPU" if small else "")
    # where the figures come from is asked by the first part: it wakes the GPU
    bench = Bench(setting, Report(title, provenance={}), end=end)
    file = Path(args.json or ("build/gpu-tiny.jsonl" if small else "bench/results/gpu.jsonl"))
    failed, wanted = 0, {"limits", *args.only.split(",")} if args.only else None
    for name, part in parts(list(setting.models), args.mamba).items():
        if wanted is not None and name not in wanted:
            continue
        start = time.monotonic()
        if start > end:
            bench.report.add(f"part {name}", "left out: the time was up")
            continue
        problem = alone(part, bench, end + GRACE_S - start)
        if problem:
            bench.report.add(f"part {name}", f"FAILED: {problem}")
            failed += 1
        if name == "limits":
            bench.read_limits()
        bench.report.add(f"part {name}: took", time.monotonic() - start, "s")
        print(f"{name}: {time.monotonic() - start:.0f} s {problem}", flush=True)
        bench.report.save_jsonl(file)
    print(bench.report.table())
    print(f"wrote {file}")
    return failed + sum("NO" in str(fact.value) for fact in bench.report.facts if fact.name.startswith("correct: "))


if __name__ == "__main__":
    raise SystemExit(main())
