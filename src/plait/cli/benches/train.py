"""A training step of the 45 M hybrid over 4 x 512 tokens: forward and backward, and the same with AdamW.

The peer trains the very same weights, written by our own export: both losses must agree before anything is timed. Model
FLOPs are three times the forward pass's, attention over visible keys only; the limit is the GEMM peak measured in the
same rounds. Memory is the growth of each side's peak over its weights and gradients, in a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.cli.bench import Inputs
from plait.cli.benches import limits, shapes
from plait.cli.benches.sides import (
    OURS,
    DisagreementError,
    Side,
    add_median,
    add_ratio,
    add_share,
    alternate,
    timed,
)
from plait.cli.benches.theirs import transformers_model
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.report import Report, provenance
from plait.train.metrics import step_flops

BATCH, LENGTH = 4, 512
PEER = "transformers"
PARTS = ("forward + backward", "step")
# losses of the same weights on the same tokens, in nats: float32 noise, and what bfloat16 activations may move
AGREE = {"fp32": 1e-3, "bf16": 3e-2}


def measure(inputs: Inputs) -> Report:
    """Train both sides in turn and report tokens/s, the share of the GEMM peak, the ratio and the memory."""
    name = inputs.model or "45m"
    config = shapes.config_of(name)
    report = Report(f"training step, {config.name or name}, {BATCH} x {LENGTH} tokens", provenance=provenance(seed=0))
    report.add("threads", torch.get_num_threads())
    for recipe in inputs.recipe or ("bf16", "fp32"):
        if recipe not in AGREE:
            raise ValueError(f"recipe={recipe!r}: training is measured in {', '.join(AGREE)}")
        _measure(report, inputs, config, recipe)
        _memory(report, inputs, name, recipe)
    return report


def _measure(report: Report, inputs: Inputs, config: ModelConfig, recipe: str) -> None:
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    model = build(config, recipe=recipe, seed=0)
    models: dict[str, nn.Module] = {OURS: model}
    if PEER in inputs.against:
        models[PEER] = transformers_model(model).train()
        # in bf16 their parameters are bfloat16, ours float32 masters
        ours, theirs = (loss_of(one, ids).item() for one in models.values())
        if abs(ours - theirs) > AGREE[recipe]:
            raise DisagreementError(f"{recipe}: losses disagree before timing: ours {ours:.5f}, theirs {theirs:.5f}")
        report.add(f"{recipe} first loss, difference to {PEER}", abs(ours - theirs), "nats/token")
    sides: dict[str, Side] = {}
    for part in PARTS:
        for name, one in models.items():
            sides[f"{name} {part}"] = timed(_run(one, ids, with_optimizer=part == "step"))
    peak = f"{OURS} peak"
    sides[peak] = limits.gemm(model.recipe.compute)
    found = alternate(sides, inputs.rounds, label=recipe, report=report)
    peaks = found.pop(peak)
    add_median(report, f"{recipe} GEMM peak", [p / 1e9 for p in peaks], "GFLOP/s")
    rates = {name: [BATCH * LENGTH / s for s in seconds] for name, seconds in found.items()}
    for name, values in rates.items():
        add_median(report, f"{recipe} {name}", values, "tokens/s")
        add_share(report, f"{recipe} {name}, share of the GEMM peak", values, flops_per_token(config), peaks)
    for part in PARTS:
        if f"{PEER} {part}" in rates:
            add_ratio(report, f"{recipe} {part}: {OURS} / {PEER}", rates[f"{OURS} {part}"], rates[f"{PEER} {part}"])


def flops_per_token(config: ModelConfig) -> float:
    """Model FLOPs of a training step per token of a sequence of LENGTH."""
    return step_flops(config, LENGTH, LENGTH * (LENGTH + 1) // 2) / LENGTH


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of next-token prediction, of our model or theirs."""
    if isinstance(model, Hybrid):
        loss = model(ids, labels=ids, n_logits=1).loss
        assert loss is not None
        return loss
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _run(model: nn.Module, ids: Tensor, *, with_optimizer: bool) -> Callable[[], None]:
    # a rate of zero: the measured model must not drift from round to round, and computes all the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True) if with_optimizer else None

    def run() -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return run


def _memory(report: Report, inputs: Inputs, name: str, recipe: str) -> None:
    """Add the memory of forward and backward of each side."""
    for side in (OURS, *((PEER,) if PEER in inputs.against else ())):
        command = [sys.executable, "-m", __name__, side, name, recipe, str(torch.get_num_threads())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            report.add(f"{recipe} {side} peak memory", "not measured: it took more than 300 s")
            continue
        if done.returncode or not done.stdout.strip():
            why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            report.add(f"{recipe} {side} peak memory", f"not measured: {why}")
            continue
        peak = json.loads(done.stdout.splitlines()[-1])
        report.add(f"{recipe} {side} peak memory over weights and gradients", peak, "bytes")


def _peak_growth(side: str, name: str, recipe: str) -> int:
    """Bytes that forward and backward need beyond weights and gradients; for a process that does nothing else."""
    config = shapes.config_of(name)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    model: nn.Module = build(config, recipe=recipe, seed=0)
    if side == PEER:
        assert isinstance(model, Hybrid)
        model = transformers_model(model).train()
    # a short step makes the gradients, so that they count as there already
    loss_of(model, ids[:1, :8]).backward()
    try:
        # the kernel forgets the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise RuntimeError("this system cannot reset a process's peak memory") from None
    before = _status("VmRSS")
    loss_of(model, ids).backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(_peak_growth(*sys.argv[1:4]))
