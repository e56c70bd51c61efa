"""Measures what scoring all width axes in one pass costs beside a plain forward pass: time and memory.

python bench/score.py --model 350m --rows 128 --length 2048 --save bench/results/score-350m.jsonl

time      processor time of `plait.compress.score.score` over that of the same batches through the same weights without
          hooks, a batch of either in turn, one thread; the solving at the end counts as scoring
memory    peak of a process that scores over the peak of one that only runs forward: its resident set (on Linux), and
          weights with the most bytes of tensors alive at once, from the allocator's record of one batch

Neither forms logits: the head is not part of a pass that scores.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from plait.compress.axes import AXES
from plait.compress.score import score
from plait.data.loader import Batch
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.report import Report

MODELS: dict[str, dict[str, object]] = {
    "tiny": {
        "pattern": "M-M*-",
        "vocab_size": 1024,
        "d_model": 256,
        "mamba2": {"n_heads": 8, "head_dim": 64, "d_state": 64, "n_groups": 4, "chunk": 64},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 64},
        "mlp": {"d_ff": 1024},
    },
    "350m-part": {
        "pattern": "M-M*-",
        "vocab_size": 1024,
        "d_model": 1024,
        "mamba2": {"n_heads": 32, "head_dim": 64, "d_state": 128, "n_groups": 8},
        "attention": {"n_heads": 16, "n_kv_heads": 4, "head_dim": 64},
        "mlp": {"d_ff": 5120},
    },
    "350m": {
        "pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-",
        "vocab_size": 32768,
        "d_model": 1024,
        "mamba2": {"n_heads": 32, "head_dim": 64, "d_state": 128, "n_groups": 8},
        "attention": {"n_heads": 16, "n_kv_heads": 4, "head_dim": 64},
        "mlp": {"d_ff": 5120},
    },
}


def text(config: ModelConfig, rows: int, length: int) -> list[Batch]:
    """Random tokens, a row per batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, 1, length), generator=generator)
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, 0] = True
    return [Batch(ids=row, targets=row.roll(-1, 1), starts=starts) for row in ids]


@torch.no_grad()
def alone(model: Hybrid, batches: list[Batch]) -> None:
    """The pass that scoring is held against."""
    for batch in batches:
        model.hidden(batch.ids, starts=batch.starts)


def times(model: Hybrid, batches: list[Batch], axes: list[str] | None) -> tuple[float, float, float]:
    """Seconds of passes that score, of the plain ones in between, and of solving; the first batch warms up."""
    with torch.device("meta"):
        plain = Hybrid(model.config, model.recipe)
    plain.load_state_dict(model.state_dict(), assign=True)
    spent, ends = [], []

    def between(done: int, total: int) -> None:
        now = time.process_time()
        alone(plain, batches[done - 1 : done])
        spent.append(time.process_time() - now)
        ends.append(time.process_time())

    score(model, batches, axes=axes, progress=between)
    forward = sum(spent[1:])
    return ends[-1] - ends[0] - forward, forward, time.process_time() - ends[-1]


def peak(model: Hybrid, batch: Batch, scores: bool) -> int:
    """Most bytes that the tensors of one batch took at once, beyond the weights."""
    with torch.profiler.profile(profile_memory=True) as profile:
        score(model, [batch]) if scores else alone(model, [batch])
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most


def child(args: argparse.Namespace, scores: bool) -> dict[str, int]:
    """What a fresh process needs for two batches."""
    words = [sys.executable, __file__, "--model", args.model, "--length", str(args.length), "--dtype", args.dtype]
    done = subprocess.run(
        [*words, "--child", "score" if scores else "alone"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def ready(args: argparse.Namespace) -> Hybrid:
    """The model with fresh weights in the dtype that is asked for."""
    model = build(ModelConfig.from_dict(MODELS[args.model]), "fp32" if args.dtype == "float32" else "bf16", seed=0)
    return model if args.dtype == "float32" else model.to(torch.bfloat16)


def as_child(args: argparse.Namespace) -> None:
    """Run two batches and tell the peaks."""
    model, scores = ready(args), args.child == "score"
    batches = text(model.config, 2, args.length)
    # building takes more than running: the peak begins anew
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    score(model, batches) if scores else alone(model, batches)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"resident": resident, "tensors": peak(model, batches[0], scores)}))


def measure(args: argparse.Namespace) -> Report:
    """Everything."""
    memory = {name: child(args, scores) for name, scores in (("alone", False), ("score", True))}
    model = ready(args)
    params = model.config.cost().params
    report = Report(f"scoring {args.model}, {args.rows} x {args.length} tokens, {args.dtype}")
    report.add("parameters", params)
    report.add("threads", torch.get_num_threads())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, found in memory.items():
        report.add(f"resident at most, {name}", found["resident"], "bytes")
        report.add(f"tensors of a batch at most, {name}", found["tensors"], "bytes")
    ratio = memory["score"]["resident"] / memory["alone"]["resident"]
    report.add("resident, score / alone", ratio, "x")
    most = [weights + memory[name]["tensors"] for name in ("score", "alone")]
    report.add("weights and tensors, score / alone", most[0] / most[1], "x")
    batches = text(model.config, args.rows, args.length)
    n = args.rows - 1
    scored, forward, solving = times(model, batches, None)
    report.add("forward alone", forward / n, "s a sequence", n=n)
    report.add("passes that score", scored / n, "s a sequence", n=n)
    report.add("solving at the end", solving, "s")
    report.add("score / alone", (scored + solving) / forward, "x", n=n)
    report.add("score / alone, over 128 sequences", (scored / n + solving / 128) / (forward / n), "x", n=n)
    for axis in AXES if args.each else ():
        scored, forward, _ = times(model, batches[: args.each + 1], [axis])
        report.add(f"passes that score {axis} only / alone", scored / forward, "x", n=args.each)
    return report


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", choices=MODELS)
    parser.add_argument("--rows", type=int, default=8, help="sequences, two at least; the first one warms up")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--each", type=int, default=0, help="also every axis alone, over so many sequences")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help="also write the report as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        return as_child(args)
    report = measure(args)
    print(report.table())
    if args.save:
        report.save_jsonl(args.save)
    return None


if __name__ == "__main__":
    main()
