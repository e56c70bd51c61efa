"""Looks inside a model in training: how large its outputs, logits and states are, and what its gates do, per layer.

One extra forward pass over a few rows of the step's batch, without gradients, with hooks on the layers; the step itself
runs as ever, and a run with telemetry ends with the same weights as one without. Per layer i, by name:

    blocks.i.qkv.l2, proj.l2, fc1.l2, fc2.l2, in_proj.l2, out_proj.l2      mean over tokens of |output|_2
    blocks.i.max_logit      largest q . k / sqrt(P), after soft_temp, before soft_cap
    blocks.i.entropy        mean over tokens and heads of - sum p log p, nats; p before soft_clip
    blocks.i.state.max, state.norm      of the SSM states at the rows' ends: largest magnitude; mean over heads of |.|_2
    blocks.i.dt.p0 .. p100, decay.p0 .. p100      quantiles over tokens and heads of dt and of exp(dt A)
    blocks.i.gate.closed, gate.open    shares of the gates z with sigmoid(z) < 0.05 and > 0.95, where SiLU is 0 or z

    blocks.i.mixer.q_proj.x.amax, x.underflow, x.saturation, w..., dy...      where a linear layer computes in few bits
    blocks.i.mixer.q_proj.w.zeros, w.flipped      of ternary weights, see train/flips.py; not in `measure`

and, as lists with an entry per head: logits' maximum, entropy, quantiles of dt and decay, states' norms, gates' shares.
QKV counts the three outputs as one vector, FC1 the gate and the up projection.

Shapes   B rows, L tokens, H heads, P head size, N state size.
Numbers  all figures in float32.
Source   Rybakov et al. 2024, arXiv:2410.16682 (outputs); Wortsman et al. 2023, arXiv:2309.14322 (logits).
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.data.packing import IGNORED
from plait.model.hybrid import Block, Hybrid
from plait.model.layer import Span
from plait.model.layers.attention import AttentionMixer
from plait.model.layers.mamba2 import Mamba2Mixer, Mamba2State
from plait.train.flips import Flips
from plait.train.metrics import JsonLines

# rows of a batch that are looked at
ROWS = 2
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SATURATED = 0.05
# what the papers call the outputs of our linear layers
NAMES = {name: "qkv" for name in ("q_proj", "k_proj", "v_proj")} | {
    **{"o_proj": "proj", "up_proj": "fc1", "gate_proj": "fc1", "down_proj": "fc2"}
}


@dataclass(slots=True)
class Figures:
    """What was seen: numbers () and lists (H, ...) by name, still on the device."""

    numbers: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    # |output|^2 of each token (B, L), by figure and layer
    squares: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    states: dict[str, Mamba2State] = field(default_factory=dict)


@torch.no_grad()
def measure(
    model: Hybrid, ids: Tensor, starts: Tensor | None = None
) -> tuple[dict[str, float], dict[str, list[object]]]:
    """Run a few rows through a model and look inside; the model is left as it was.

    Args:
        model: whichever; compiled blocks run uncompiled here.
        ids: (B, L) int64, on the model's device.
        starts: (B, L) bool, True at the first token of each packed document.

    Returns: numbers, and lists with an entry per head, by the names of this file's docstring.
    """
    seen = Figures()
    with torch.compiler.set_stance("force_eager"):
        with _hooks(model, seen):
            model.hidden(ids, starts=starts)
        seen.numbers |= _lost(model, ids, starts)
    for name, parts in seen.squares.items():
        seen.numbers[f"{name}.l2"] = sum(parts.values(), torch.zeros(())).sqrt().mean()
    for at, state in seen.states.items():
        norms = state.ssm.float().flatten(2).norm(dim=-1).mean(0)  # (H,)
        seen.numbers[f"{at}.state.max"], seen.numbers[f"{at}.state.norm"] = state.ssm.abs().max().float(), norms.mean()
        seen.heads[f"{at}.state.norm"] = norms
    # one wait for the device
    values = torch.stack([t.float() for t in seen.numbers.values()]).tolist()
    numbers = dict(zip(seen.numbers, values, strict=True))
    return dict(sorted(numbers.items())), {name: t.tolist() for name, t in sorted(seen.heads.items())}


@contextmanager
def _hooks(model: Hybrid, seen: Figures) -> Iterator[None]:
    handles = []
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at, mixer = f"blocks.{i}", block.mixer
        for path, module in mixer.named_modules():
            owner, _, name = path.rpartition(".")
            if name.endswith("_proj") or name in ("latent_in", "latent_out"):
                figure = ".".join(part for part in (at, owner, NAMES.get(name, name)) if part)
                handles.append(module.register_forward_hook(_output(seen, figure, name)))
        if isinstance(mixer, AttentionMixer):
            handles.append(mixer.register_forward_pre_hook(_attention(seen, at)))
        if isinstance(mixer, Mamba2Mixer):
            handles.append(mixer.register_forward_pre_hook(_with_state(seen, at)))
            handles.append(mixer.in_proj.register_forward_hook(_gates(seen, at, mixer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lost(model: Hybrid, ids: Tensor, starts: Tensor | None) -> dict[str, Tensor]:
    """What the operands of linear layers in few bits lose, gradients of these rows' mean loss among them."""
    if not model.recipe.rules:
        return {}
    found: dict[str, Tensor] = {}
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "watch")]
    for name, module in layers:
        module.watch = partial(_note, found, name)  # type: ignore[assignment]
    try:
        with torch.enable_grad():
            x, _ = model.hidden(ids, starts=starts)
            targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
            if starts is not None:
                targets[:, :-1].masked_fill_(starts[:, 1:], IGNORED)
            counted = max(int((targets != IGNORED).sum()), 1)
            loss = model.loss_sum(x, targets, scale=1.0 / counted)
            # down to the first parameter, through every layer; no gradient is kept
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad][:1], allow_unused=True)
    finally:
        for _, module in layers:
            module.watch = None  # type: ignore[assignment]
    return found


def _note(found: dict[str, Tensor], name: str, figure: str, value: Tensor) -> None:
    found[f"{name}.{figure}"] = value.detach()


def _output(seen: Figures, figure: str, name: str):  # noqa: ANN202
    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen.squares.setdefault(figure, {})[name] = y.float().pow(2).sum(-1)

    return hook


def _attention(seen: Figures, at: str):  # noqa: ANN202
    def hook(mixer: AttentionMixer, args: tuple[Tensor, Span, object]) -> None:
        largest, entropy = mixer.extremes(args[0], args[1])
        seen.numbers[f"{at}.max_logit"], seen.heads[f"{at}.max_logit"] = largest.max(), largest
        seen.numbers[f"{at}.entropy"], seen.heads[f"{at}.entropy"] = entropy.mean(), entropy

    return hook


def _with_state(seen: Figures, at: str):  # noqa: ANN202
    def hook(mixer: Mamba2Mixer, args: tuple[Tensor, Span, object]) -> tuple[object, ...]:
        # a state of its own, into which the layer writes where the rows end
        u, span = args[0], args[1]
        seen.states[at] = Mamba2State(mixer.spec, u.shape[0], u.device, u.dtype)
        return u, span, seen.states[at]

    return hook


def _gates(seen: Figures, at: str, mixer: Mamba2Mixer):  # noqa: ANN202
    s = mixer.spec

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        z, _, raw = y.float().flatten(0, 1).split([s.d_inner, s.conv_dim, s.n_heads], dim=-1)
        dt = torch.nn.functional.softplus(raw + mixer.dt_bias.float()).clamp(*s.dt_limit)
        decay = torch.exp(-dt * mixer.A_log.float().exp())
        places = torch.tensor(QUANTILES, device=y.device)
        for name, values in (("dt", dt), ("decay", decay)):  # (tokens, H)
            for place, value in zip(QUANTILES, torch.quantile(values.flatten(), places), strict=True):
                seen.numbers[f"{at}.{name}.p{place * 100:g}"] = value
            seen.heads[f"{at}.{name}"] = torch.quantile(values, places, dim=0).mT
        gate = torch.sigmoid(z).unflatten(-1, (s.n_heads, s.head_dim))
        for name, there in (("closed", gate < SATURATED), ("open", gate > 1 - SATURATED)):
            share = there.float().mean((0, 2))
            seen.numbers[f"{at}.gate.{name}"], seen.heads[f"{at}.gate.{name}"] = share.mean(), share

    return hook


class Telemetry:
    """Writes telemetry.jsonl of a run: a line per sample."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Args: path: the file. after: draws of data made; later lines are no part of the run."""
        self.lines = JsonLines(path, after=after)
        self.flips = Flips()

    def write(self, model: Hybrid, ids: Tensor, starts: Tensor | None, *, step: int, skipped: int) -> None:
        """Look inside the model and write what was seen after `step` updates."""
        begin = time.perf_counter()
        device = model.device
        figures, heads = measure(model, ids[:ROWS].to(device), None if starts is None else starts[:ROWS].to(device))
        figures |= self.flips.look(model)
        seconds = time.perf_counter() - begin
        found = {"step": step, "skipped": skipped, "seconds": seconds, "figures": figures, "heads": heads}
        self.lines.write({name: _rounded(value) for name, value in found.items()})

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


def _rounded(value: object) -> object:
    """Four digits, which is what a chart shows; words for what JSON lacks."""
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else repr(value)
    return value
