"""Reads a prompt of a million tokens with a small hybrid, in pieces, and watches the memory of the process.

    python bench/long.py --tokens 1000000 --save bench/results/long-cpu.jsonl

First, at a length that fits in one piece, the pieces must give the logits and states of the whole (float32). Then a
fresh process loads the weights (bfloat16), resets the kernel's high-water mark of its resident memory, reads the prompt
as the engine does, and draws a few tokens. What is subtracted from the mark (VmHWM) is named beside each figure:

    beyond weights and KV     mark - bytes of weights - bytes of keys and values: interpreter and libraries included
    growth beyond KV          mark - resident memory before the prompt (with weights, libraries) - keys and values
    drift                     resident memory less keys and values so far, over the second half of the run: last - first
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import plait
from plait.engine.runner import prefill
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.report import Report

PATTERN = "M-MMM-MM*M-MMM-MMM"
VOCABULARY = 256  # bytes
KV = (".k", ".v")


def config(d_model: int = 384) -> ModelConfig:
    """A hybrid, mostly Mamba-2, with one attention layer of one head: its products grow with the square."""
    return ModelConfig.from_pattern(
        PATTERN,
        name="20 M byte-level hybrid",
        vocab_size=VOCABULARY,
        d_model=d_model,
        mamba2={"n_heads": d_model // 32, "head_dim": 64, "d_state": 64, "n_groups": 4},
        attention={"n_heads": 1, "n_kv_heads": 1, "head_dim": 32},
        mlp={"d_ff": 4 * d_model},
    )


def differences(length: int, chunk: int, d_model: int) -> tuple[float, float]:
    """Largest difference of logits and of states between pieces and one piece, relative to the largest value."""
    model = build(config(d_model), recipe="fp32", seed=0)
    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        one, many = model.cache(1), model.cache(1, capacity=length)
        whole = model(ids, cache=one, n_logits=1).logits[:, 0]
        pieces = prefill(model, ids.tolist(), many, chunk)
    theirs = one.tensors()
    states = [
        (t - theirs[name]).abs().max() / theirs[name].abs().max() for name, t in many.tensors().items() if "ssm" in name
    ]
    return float((pieces - whole).abs().max() / whole.abs().max()), float(torch.stack(states).max())


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (VmHWM) at most since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def read(folder: Path, n_tokens: int, chunk: int) -> dict[str, object]:
    """In a fresh process: load, read n_tokens random tokens, draw 8 more; what was measured."""
    imported = resident()
    model = plait.load(folder, device="cpu")
    loaded = resident()
    Path("/proc/self/clear_refs").write_text("5")
    ids = torch.randint(0, VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = model.cache(1, capacity=n_tokens + 1024)
    per_token = model.config.cost().kv_numbers_per_token * model.recipe.compute.itemsize
    samples = _sampled(model, n_tokens, chunk, per_token)
    begun = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        logits = prefill(model, [ids], cache, chunk)
        seconds, busy = time.perf_counter() - begun[0], time.process_time() - begun[1]
        for _ in range(8):
            logits = model(logits.argmax(-1)[:, None], cache=cache, n_logits=1).logits[:, 0]
    tensors = cache.tensors()
    return {
        "imported": imported,
        "loaded": loaded,
        "peak": resident("VmHWM"),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "kv": sum(t.numel() * t.element_size() for name, t in tensors.items() if name.endswith(KV)),
        "states": sum(t.numel() * t.element_size() for name, t in tensors.items() if "ssm" in name or "conv" in name),
        "seconds": seconds,
        "processor seconds": busy,
        "finite": bool(logits.isfinite().all()) and all(bool(t.isfinite().all()) for t in tensors.values()),
        "samples": samples,
    }


def _sampled(model: Hybrid, n_tokens: int, chunk: int, kv_bytes_per_token: int) -> list[dict[str, float]]:
    """A list that fills as the model reads: tokens so far, seconds, resident memory, the same less KV."""
    samples: list[dict[str, float]] = []
    hidden, begun, every = model.hidden, time.perf_counter(), max(1, n_tokens // 20 // chunk)
    calls = 0

    def watched(ids: torch.Tensor, **how: object) -> object:
        nonlocal calls
        result, now = hidden(ids, **how), resident()  # type: ignore[arg-type]
        calls += 1
        if calls % every == 0 and ids.shape[1] > 1:
            tokens = calls * chunk
            at = {"tokens": tokens, "seconds": round(time.perf_counter() - begun, 1), "resident": now}
            samples.append(at | {"resident less KV": now - tokens * kv_bytes_per_token})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        return result

    model.hidden = watched  # type: ignore[method-assign,assignment]
    return samples


def measure(n_tokens: int, chunk: int, check: int, d_model: int) -> Report:
    """Compare, then run a fresh process; the report of both."""
    report = Report(f"{n_tokens:,} tokens through a small hybrid, in pieces of {chunk}")
    logits, states = differences(check, chunk, d_model)
    if not max(logits, states) < 1e-4:
        raise SystemExit(f"pieces and the whole of {check} tokens differ: logits {logits:.2g}, states {states:.2g}")
    sizes = config(d_model)
    with tempfile.TemporaryDirectory() as folder:
        plait.save(build(sizes, recipe="bf16", seed=0), Path(folder) / "model", dtype="bfloat16")
        command = [sys.executable, __file__, "--read", str(Path(folder) / "model")]
        command += ["--tokens", str(n_tokens), "--chunk", str(chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    later = [s["resident less KV"] for s in found["samples"][len(found["samples"]) // 2 :]] or [0]
    report.add("parameters", sizes.cost().params)
    report.add("pattern", PATTERN)
    report.add("threads", torch.get_num_threads())
    report.add(f"logits, pieces to whole at {check}", logits, "relative")
    report.add(f"states, pieces to whole at {check}", states, "relative")
    report.add("prefill", found["seconds"], "s")
    report.add("prefill, processor", found["processor seconds"], "s")
    report.add("prefill speed", n_tokens / found["seconds"], "tokens/s")
    for name in ("weights", "kv", "states"):
        report.add(name, found[name], "bytes")
    report.add("resident after import", found["imported"], "bytes")
    report.add("resident before the prompt", found["loaded"], "bytes")
    report.add("peak resident", found["peak"], "bytes")
    report.add("beyond weights and KV", found["peak"] - found["weights"] - found["kv"], "bytes")
    report.add("growth beyond KV", found["peak"] - found["loaded"] - found["kv"], "bytes")
    report.add("drift", later[-1] - later[0], "bytes")
    report.add("logits and states finite", found["finite"])
    for s in found["samples"]:
        report.add(f"resident less KV at {s['tokens']:,}", s["resident less KV"], "bytes")
        report.add(f"seconds at {s['tokens']:,}", s["seconds"], "s")
    return report


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--check", type=int, default=20_000, help="length at which pieces and the whole are compared")
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--save", type=Path, help="also write the report as JSON lines")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if args.read:
        print(json.dumps(read(args.read, args.tokens, args.chunk)))
        return
    report = measure(args.tokens, args.chunk, args.check, args.d_model)
    print(report.table())
    if args.save:
        report.save_jsonl(args.save)


if __name__ == "__main__":
    main()
