"""Tunes every Triton kernel on this GPU at the sizes of a model: `plait bench device --tune`.

Each operation is run once to learn which kernels it launches, and at which class of shapes; then each kernel's values
(`kernels/triton/candidates.py`) are timed inside the operation, and the winners written to the cache on disk that the
kernels read from then on. Backward passes come first: what both directions launch is tuned where it costs more.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.cli.bench import Inputs
from plait.cli.benches import shapes
from plait.cli.benches.case import Call, run
from plait.cli.benches.many import Maker
from plait.cli.drawing import Drawn
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.ops.activation import gate, squared_relu
from plait.ops.conv import causal_conv1d
from plait.ops.decode_attention import decode_attention
from plait.ops.dispatch import Op
from plait.ops.loss import linear_cross_entropy
from plait.ops.norm import gated_rmsnorm, rms_norm
from plait.ops.rope import Rope, inverse_frequencies, rotate
from plait.ops.sample import sample_ids
from plait.ops.ssd import selective_state_update, ssd
from plait.report import Report, provenance

MODEL = "nemotron-h-8b"
TOKENS = (2048, 8192)
BATCHES = (1, 8, 32, 64, 128, 256)
KEYS = 8192
# of the head's input: so narrow that its products weigh nothing beside the rows of logits
NARROW = 16

log = logging.getLogger(__name__)
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An operation to tune inside of. replays: it is so short that its launches must not be timed."""

    name: str
    run: Callable[[], object]
    replays: bool = False


def measure(inputs: Inputs) -> Report:
    """Tune on this machine's GPU.

    Raises: ValueError if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--tune: no NVIDIA GPU is visible here, and kernels are tuned by timing them on one; without tuning they "
            "take good defaults"
        )
    report = Drawn("tuned kernels", provenance=provenance(seed=0))
    tune_all(report, shapes.config_of(inputs.model or MODEL), tokens=inputs.tokens or TOKENS)
    return report


def tune_all(
    report: Report,
    config: ModelConfig,
    *,
    tokens: tuple[int, ...] = TOKENS,
    batches: tuple[int, ...] = BATCHES,
    device: str = "cuda",
    seconds: float = float("inf"),
    timers: tuple[Timer, Timer] | None = None,
    keep: bool = True,
) -> None:
    """Tune all kernels of a model's operations; a kernel that fails is named and does not stop the others.

    Args:
        report: takes default time, best time and gain of each; its drawing, if it has one, a table of them.
        config: sizes.
        tokens: lengths of prompts, longest last.
        batches: sequences of a decode step.
        seconds: begin no kernel after so many; it keeps what it had.
        timers: for work that is launched, and for work that is replayed; by default on the GPU.
        keep: write the winners to the cache on disk.
    """
    from plait.kernels.triton.candidates import values
    from plait.kernels.triton.tuning import asked, cache_file, gpu_name, launched, replayed, tune

    launch_timer, replay_timer = timers or (launched, replayed)
    report.add("GPU", gpu_name())
    done: set[tuple[str, str]] = set()
    lines = [("kernel and shapes", "default", "best", "gain", "keywords")]
    begun = time.monotonic()
    for work in works(config, tokens, batches, device):
        try:
            launches = asked(work.run)
        except RuntimeError as problem:
            report.add(work.name, f"FAILED: {problem}"[:300])
            log.warning("%s: %s", work.name, problem)
            continue
        for kernel, classes in launches.items():
            # what was tuned before keeps what was found there
            new = [c for c in classes if (kernel, c) not in done]
            if not new:
                continue
            done |= {(kernel, c) for c in new}
            if time.monotonic() - begun > seconds:
                report.add(f"{', '.join(new)}", "left out: the time was up")
                continue
            timer = replay_timer if work.replays else launch_timer
            try:
                found = tune(kernel, values(kernel), work.run, classes=new, keep=keep, timer=timer)
            except (ValueError, RuntimeError) as problem:
                report.add(f"{', '.join(new)}", f"FAILED in {work.name}: {problem}"[:300])
                log.warning("%s in %s: %s", kernel, work.name, problem)
                continue
            name, gain = ", ".join(new), found.default_ms / found.best_ms
            how = " ".join(f"{key}={value}" for key, value in found.config.items())
            # times are the whole operation's: a kernel's own part of a gain is larger
            report.add(f"{name}: default, in {work.name}", found.default_ms * 1e3, "us")
            report.add(f"{name}: best", found.best_ms * 1e3, "us")
            report.add(f"{name}: gain", gain, "x")
            report.add(f"{name}: keywords", how)
            lines.append(
                (name, f"{found.default_ms * 1e3:.1f} us", f"{found.best_ms * 1e3:.1f} us", f"{gain:.2f}", how)
            )
            log.info("%4.0f s  %s  %s", time.monotonic() - begun, work.name, "  ".join(lines[-1]))
    if keep:
        report.add("kept in", cache_file().name)
    if isinstance(report, Drawn):
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        rows = ("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        report.drawing = "\n".join([f"tuned for {config.name} on {gpu_name()}", *rows, f"kept in {cache_file()}"])


def works(config: ModelConfig, tokens: tuple[int, ...], batches: tuple[int, ...], device: str) -> Iterator[Work]:
    """A model's operations: over many tokens with and without their backward passes, then those of a decode step."""
    by_kind = {type(spec): spec for spec in config.layers}
    make = Maker(config, device)
    mamba, mlp, attends = (by_kind.get(kind) for kind in (Mamba2, MLP, Attention))
    many: list[tuple[str, Op, Callable[[int], Call]]] = [("rms norm", rms_norm, make.norm)]
    if isinstance(mamba, Mamba2):
        make.mamba = mamba
        many = [("ssd", ssd, make.ssd), ("convolution", causal_conv1d, make.conv), *many]
        many.append(("gated norm", gated_rmsnorm, make.gated))
    if isinstance(mlp, MLP):
        make.mlp = mlp
        many.append(("gate", gate, _gated(make)) if mlp.gated else ("squared ReLU", squared_relu, make.hidden))
    if isinstance(attends, Attention) and attends.rope is not None:
        many.append(("rotation", rotate, _rotated(make, attends, attends.rope)))
    for name, op, arguments in many:
        for length in sorted(tokens, reverse=True):
            call = arguments(length)
            for gradients in (True, False):
                end = f"{length} tokens" + (", fwd + bwd" if gradients else "")
                yield Work(name=f"{name}, {end}", run=lambda op=op, call=call, g=gradients: run(op, call, gradients=g))
    yield Work(name="cross-entropy", run=_cross_entropy(make, max(tokens) // 4))
    if isinstance(mamba, Mamba2):
        for batch in batches:
            for dtype in (torch.float32, torch.float16):
                name = f"state update, batch {batch}, {str(dtype)[6:]} state"
                yield Work(name=name, run=_update(make, mamba, batch, dtype), replays=True)
    if isinstance(attends, Attention):
        yield Work(name=f"decode attention, {KEYS} keys", run=_decode(make, attends), replays=True)
    yield Work(name="sampling", run=_sampling(make, 32), replays=True)


def _gated(make: Maker) -> Callable[[int], Call]:
    return lambda L: ((make.random(1, L, make.mlp.d_ff), make.hidden(L)[0][0]), {"activation": make.mlp.activation})


def _rotated(make: Maker, s: Attention, rope: Rope) -> Callable[[int], Call]:
    w, temperature = inverse_frequencies(rope, s.head_dim)

    def arguments(L: int) -> Call:
        positions = torch.arange(L, device=make.device)[None]
        x = make.random(1, L, s.n_heads, s.head_dim)
        # speeds get no gradient, so they are not among the tensors
        return (x,), {"positions": positions, "frequencies": w.to(make.device), "temperature": temperature}

    return arguments


def _cross_entropy(make: Maker, tokens: int) -> Callable[[], object]:
    V = make.config.vocab_size
    h, w = make.random(max(tokens, 1), NARROW).requires_grad_(), make.random(V, NARROW)
    targets = torch.randint(0, V, (h.shape[0],), device=make.device)
    return lambda: torch.autograd.grad(linear_cross_entropy(h, w, targets), h)


def _update(make: Maker, s: Mamba2, batch: int, dtype: torch.dtype) -> Callable[[], object]:
    (x, dt, A, B, C), rest = make.ssd(batch)
    state = torch.zeros(batch, s.n_heads, s.head_dim, s.d_state, device=make.device, dtype=dtype)
    bias, D = rest["dt_bias"], rest["D"]
    assert isinstance(bias, Tensor) and isinstance(D, Tensor)
    seed = torch.tensor([7], device=make.device) if dtype == torch.float16 else None

    @torch.no_grad()
    def update() -> Tensor:
        return selective_state_update(state, x[0], dt[0], A, B[0], C[0], D=D, dt_bias=bias, rounding_seed=seed)

    return update


def _decode(make: Maker, s: Attention) -> Callable[[], object]:
    q, shape = make.random(1, s.n_heads, s.head_dim), (1, s.n_kv_heads, KEYS, s.head_dim)
    k, v = make.random(*shape), make.random(*shape)
    lengths = torch.full((1,), KEYS, device=make.device)
    return torch.no_grad()(lambda: decode_attention(q, k, v, lengths))


def _sampling(make: Maker, batch: int) -> Callable[[], object]:
    logits = make.random(batch, make.config.vocab_size) * 3.0
    u = torch.rand(batch, device=make.device, dtype=torch.float64)
    of = lambda value, dtype=torch.float32: torch.full((batch,), value, device=make.device, dtype=dtype)  # noqa: E731
    how = {"temperature": of(0.8), "top_k": of(50, torch.int32), "top_p": of(0.95), "min_p": of(0.0)}
    return torch.no_grad()(lambda: sample_ids(logits, u, **how))
