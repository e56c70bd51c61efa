"""A training step of the 45 M-parameter hybrid: forward, backward and AdamW over 4 x 512 tokens.

The peer trains the very same weights, written by our own export: both losses must agree before anything is timed.
Model FLOPs are three times the forward pass's; the limit is the GEMM peak measured in the same run.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plait.cli.benches.sides import BenchSettings, add_median, alternate
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.report import Report, provenance
from plait.train.metrics import peak_flops_per_s

BATCH, LENGTH = 4, 512
HYBRID_45M = ModelConfig.from_pattern(
    "M-M-M-M*-M-M-M-",
    name="hybrid-45m",
    vocab_size=16384,
    d_model=512,
    mamba2={"n_heads": 16, "head_dim": 64, "d_state": 64, "n_groups": 4, "chunk": 128},
    attention={"n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
    mlp={"d_ff": 2048},
)
# losses of the same weights on the same tokens, in nats: float32 noise, and what bfloat16 activations may move
AGREE = {"fp32": 1e-3, "bf16": 3e-2}


def measure(settings: BenchSettings) -> Report:
    """Train both sides in turn and report tokens/s, the share of the GEMM peak and the ratio."""
    report = Report("training step, 45 M hybrid, 4 x 512 tokens", provenance=provenance(seed=0))
    report.add("threads", torch.get_num_threads())
    ids = torch.randint(0, HYBRID_45M.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    for precision in ("bf16", "fp32") if settings.precision == "both" else (settings.precision,):
        _measure(report, precision, ids, settings)
    return report


def _measure(report: Report, precision: str, ids: Tensor, settings: BenchSettings) -> None:
    model = build(HYBRID_45M, recipe=precision, seed=0)
    peak = peak_flops_per_s(torch.device("cpu"), model.recipe.compute)
    sides: dict[str, Callable[[], float]] = {"plait": _step_of_ours(model, ids)}
    if settings.against:
        theirs = _transformers(model, ids)
        ours, peer = sides["plait"](), theirs()
        if abs(ours - peer) > AGREE[precision]:
            raise RuntimeError(f"{precision}: losses disagree before timing: ours {ours:.5f}, the peer's {peer:.5f}")
        report.add(f"{precision} first loss, difference to {settings.against}", abs(ours - peer), "nats/token")
        sides[settings.against] = theirs
    seconds = alternate(sides, settings.rounds)
    rates = {name: [BATCH * LENGTH / s for s in runs] for name, runs in seconds.items()}
    for name, values in rates.items():
        add_median(report, f"{precision} {name}", values, "tokens/s")
    cost = HYBRID_45M.cost()
    # a token meets half of the sequence's keys on average
    flops = 3 * (cost.flops_per_token + cost.flops_per_token_per_key * LENGTH / 2)
    report.add(f"{precision} GEMM peak", peak / 1e9, "GFLOP/s")
    add_median(report, f"{precision} plait, share of the peak", [r * flops / peak for r in rates["plait"]], "")
    if settings.against:
        pairs = [a / b for a, b in zip(rates["plait"], rates[settings.against], strict=True)]
        add_median(report, f"{precision} plait / {settings.against}", pairs, "x")


def _step_of_ours(model: Hybrid, ids: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = model(ids, labels=ids, n_logits=1).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _transformers(model: Hybrid, ids: Tensor) -> Callable[[], float]:
    """The library's model with our weights, in the same precision; its parameters are bfloat16 for bf16."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--against transformers: it is not installed; pip install transformers") from None
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "hf", format="hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=model.recipe.compute)
    theirs.train()
    for module in theirs.modules():
        # it clamps dt to time_step_min instead of the config's limit; without this the losses differ
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
