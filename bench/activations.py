"""Counts the memory that activations of a training step take, says who keeps them, and what packing costs.

python bench/activations.py --save bench/results/activations-45m.jsonl

kept       storages that autograd saves for the backward pass, each counted once, parameters left out
peak       most bytes of all tensors together during forward and backward, beyond weights and gradients: from the
           allocator's record (torch.profiler), not from the process
packing    processor time of a step over packed rows / over plain rows of the same tokens, alternated, one thread
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from plait.cli.benches.shapes import config_of
from plait.dist.parallel import recompute
from plait.model.hybrid import Hybrid, build
from plait.report import Report

BATCH, LENGTH = 4, 512


def step(model: Hybrid, ids: Tensor, starts: Tensor | None = None) -> None:
    """Forward and backward of next-token prediction."""
    loss_of(model, ids, starts).backward()


def loss_of(model: Hybrid, ids: Tensor, starts: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the rows, as training takes it: no logits."""
    x, _ = model.hidden(ids, starts=starts)
    return model.loss_sum(x, ids.roll(-1, 1), scale=1 / ids.numel())


def kept(model: Hybrid, ids: Tensor) -> Counter[str]:
    """Bytes that the forward pass leaves for the backward pass, by the line of ours that led there."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}  # held, so that no address is used twice
    places: Counter[str] = Counter()

    def note(t: Tensor) -> Tensor:
        at = t.untyped_storage().data_ptr()
        if at not in seen and at not in parameters:
            seen[at] = t
            places[_place()] += t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        loss_of(model, ids)
    return places


def _place() -> str:
    """Where we are inside the model: "mamba2.py forward > norm.py _" and the like."""
    frame, names = sys._getframe(2), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "plait" in path.parts and path.name not in ("dispatch.py", "hybrid.py", "parallel.py"):
            names.append(f"{path.name}:{frame.f_lineno}")
        elif path.name == "hybrid.py" and not names:
            names.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(names[:2])


def peak(model: Hybrid, ids: Tensor) -> int:
    """Most bytes that tensors took at once during a step, beyond those alive before it and gradients."""
    model.zero_grad(set_to_none=False)  # gradients are there already: only activations come and go
    with torch.profiler.profile(profile_memory=True) as profile:
        step(model, ids)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def packing(model: Hybrid, ids: Tensor, n_documents: int, rounds: int) -> list[float]:
    """Ratios of processor time, packed rows of so many documents over plain rows of the same tokens."""
    B, L = ids.shape
    starts = torch.zeros(B, L, dtype=torch.bool)
    starts[:, :: -(-L // n_documents)] = True
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for given in (starts, None):
            begun = time.process_time()
            step(model, ids, given)
            seconds.append(time.process_time() - begun)
            model.zero_grad()
        ratios.append(seconds[0] / seconds[1])
    # the first round warms up
    return ratios[1:]


def measure(name: str, rounds: int) -> Report:
    """Everything, for one of the benches' models."""
    config = config_of(name)
    report = Report(f"activations of a training step, {name} hybrid, {BATCH} x {LENGTH} tokens, bf16")
    report.add("threads", torch.get_num_threads())
    model = build(config, recipe="bf16", seed=0)
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    step(model, ids)
    for n_documents, length in ((1, LENGTH), (8, LENGTH), (8, 4 * LENGTH)):
        rows = ids.view(-1, length)
        found = packing(model, rows, n_documents, rounds)
        title = f"packed / plain, {rows.shape[0]} x {length}, {n_documents} documents a row"
        report.add(title, statistics.median(found), "x", n=len(found), spread=statistics.pstdev(found))
    places = kept(model, ids)
    report.add("kept", sum(places.values()), "bytes")
    report.add("kept per token and layer", sum(places.values()) / ids.numel() / len(config.layers), "bytes")
    report.add("peak", peak(model, ids), "bytes")
    for place, n_bytes in places.most_common(16):
        report.add(f"kept at {place}", n_bytes, "bytes")
    recompute(model)
    report.add("kept with recompute", sum(kept(model, ids).values()), "bytes")
    report.add("peak with recompute", peak(model, ids), "bytes")
    return report


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="45m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="also write the report as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(args.model, args.rounds)
    print(report.table())
    if args.save:
        report.save_jsonl(args.save)


if __name__ == "__main__":
    main()
