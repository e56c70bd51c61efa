"""Blockwise local distillation: every replacement learns to do what its layer does, on what enters that layer.

    loss of a replacement f' of layer f     |f'(x) - f(x)|^2 / |f(x)|^2,     x: what enters the layer in the teacher

f without the residual, over all numbers of a batch: 1 is as good as no layer at all. Replacements learn while the
teacher reads: at each layer, those of the layer take a step on what has just gone through it, so that memory holds one
layer's activations whatever the library's size, and no gradient leaves a layer.

Numbers  weights, moments and losses in float32; products in the teacher's dtype.
Source   Bercovich et al. 2024, arXiv:2411.19146 section 3.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW

from plait.compress.held import read, write
from plait.compress.replace import Library, Replacement, begun, plain
from plait.compress.score import Scores
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint
from plait.model.hybrid import Block, Hybrid
from plait.model.layer import Span
from plait.model.layers import KINDS
from plait.train.metrics import write_whole

LOSSES = "local.json"
# a step was made: steps done and in all, over all groups
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """How replacements learn.

    steps: updates. lr: the highest; it rises over the first tenth and falls to a tenth of itself. weight_decay, clip:
    of each replacement by itself. at_once: numbers of weights that learn in one pass of the teacher; None for all.
    save_every: steps between saved states. seed: of fresh weights.
    """

    steps: int = 200
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    at_once: int | None = None
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.save_every < 1 or not self.lr > 0:
            raise ValueError(f"steps={self.steps}, save_every={self.save_every}, lr={self.lr}: must be positive")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = max(self.steps // 10, 1)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(self.steps - warm, 1)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass(slots=True, kw_only=True)
class Pupil:
    """A replacement that learns; losses of its first and latest step."""

    wanted: Replacement
    block: Block
    optimizer: AdamW
    first: float | None = None
    last: float | None = None


def teach(
    teacher: Hybrid,
    checkpoint: Checkpoint,
    scores: Scores,
    replacements: Library,
    batches: Callable[[int], Sequence[Batch]],
    folder: Path,
    lessons: Lessons | None = None,
    *,
    progress: Progress | None = None,
) -> dict[tuple[int, str], tuple[float, float]]:
    """Make the weights of a library.

    Args:
        teacher: the model of `checkpoint`; it stays as it is.
        checkpoint: what narrower layers are cut from, by `scores`.
        replacements: what is to be made; files that are there already are not made again.
        batches: the micro-batches of a step, from 0; the same whenever they are asked for.
        folder: gets layer-007/NAME.safetensors per replacement (`Replacement.file`), and local.json.
        lessons: how they learn; the usual way if None.

    Returns: (layer, name) -> losses of its first and its last step, also in local.json.
    """
    lessons = lessons or Lessons()
    told = _losses(folder)
    missing = [r for row in replacements for r in row if r.learns and not r.file(folder).is_file()]
    groups = _groups(teacher, missing, lessons.at_once)
    for i, group in enumerate(groups):
        state = folder / ".learning.safetensors"
        recipe = plain(teacher)
        pupils = [_pupil(begun(checkpoint, scores, r, recipe, lessons.seed), r, teacher, lessons) for r in group]
        done = _resume(state, pupils)
        for step in range(done, lessons.steps):
            _step(teacher, pupils, batches(step), lessons, lessons.rate(step))
            if (step + 1) % lessons.save_every == 0 and step + 1 < lessons.steps:
                _save(state, pupils, step + 1)
            if progress is not None:
                progress(i * lessons.steps + step + 1, len(groups) * lessons.steps)
        for pupil in pupils:
            told[_name(pupil.wanted)] = [pupil.first or 0.0, pupil.last or 0.0]
        write_whole(_made(folder) / LOSSES, json.dumps(told, indent=1) + "\n")
        for pupil in pupils:
            tensors = {name: t.to(checkpoint.dtype) for name, t in pupil.block.state_dict().items()}
            write(_made(pupil.wanted.file(folder).parent) / pupil.wanted.file(folder).name, tensors, {})
        state.unlink(missing_ok=True)
    learnt = {(r.layer, r.name): told[_name(r)] for row in replacements for r in row if r.learns and _name(r) in told}
    return {key: (first, last) for key, (first, last) in learnt.items()}


@contextmanager
def listening(teacher: Hybrid, hook: Callable[[int, Tensor, Span, Tensor], None]) -> Iterator[None]:
    """Call hook(layer, what enters it, span, what leaves it) for every layer that the teacher runs."""

    def heard(i: int) -> Callable[..., None]:
        return lambda _, args, y: hook(i, args[0], args[1], y)

    handles = [block.register_forward_hook(heard(i)) for i, block in enumerate(teacher.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step(teacher: Hybrid, pupils: Sequence[Pupil], batches: Sequence[Batch], lessons: Lessons, lr: float) -> None:
    """One update of every pupil, from all micro-batches."""
    at: dict[int, list[Pupil]] = {}
    for pupil in pupils:
        at.setdefault(pupil.wanted.layer, []).append(pupil)
    losses = dict.fromkeys(range(len(pupils)), 0.0)
    number = {id(pupil): i for i, pupil in enumerate(pupils)}

    def learn(layer: int, x: Tensor, span: Span, y: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        wanted = (y - x).to(wide)
        size = wanted.square().mean().clamp(min=1e-30)
        for pupil in at.get(layer, ()):
            with torch.enable_grad():
                given = (pupil.block(x.detach(), span) - x.detach()).to(wide)
                loss = (given - wanted).square().mean() / size
                (loss / len(batches)).backward()
            losses[number[id(pupil)]] += float(loss.detach()) / len(batches)

    with listening(teacher, learn), torch.no_grad():
        for batch in batches:
            batch = batch.to(teacher.device)
            teacher.hidden(batch.ids, starts=batch.starts)
    for i, pupil in enumerate(pupils):
        torch.nn.utils.clip_grad_norm_(pupil.block.parameters(), lessons.clip)
        for group in pupil.optimizer.param_groups:
            group["lr"] = lr
        pupil.optimizer.step()
        pupil.optimizer.zero_grad(set_to_none=True)
        pupil.last = losses[i]
        pupil.first = losses[i] if pupil.first is None else pupil.first


def _pupil(block: Block, wanted: Replacement, teacher: Hybrid, lessons: Lessons) -> Pupil:
    block = block.to(teacher.device).requires_grad_(True)
    # one dimension: norms, biases, A_log, D, dt_bias
    decay = [p for p in block.parameters() if p.ndim >= 2]
    plain = [p for p in block.parameters() if p.ndim < 2]
    groups: list[dict[str, object]] = [{"params": decay, "weight_decay": lessons.weight_decay}]
    groups.append({"params": plain, "weight_decay": 0.0})
    return Pupil(wanted=wanted, block=block, optimizer=AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True))


def _groups(teacher: Hybrid, wanted: Sequence[Replacement], at_once: int | None) -> list[list[Replacement]]:
    """Replacements that learn together, in order, so many numbers at a time."""
    groups: list[list[Replacement]] = []
    held = 0
    for r in wanted:
        assert r.spec is not None
        size = KINDS[r.spec.symbol].cost(r.spec, teacher.config.d_model).params
        if not groups or (at_once is not None and held + size > at_once):
            groups.append([])
            held = 0
        groups[-1].append(r)
        held += size
    return groups


def _save(path: Path, pupils: Sequence[Pupil], step: int) -> None:
    tensors: dict[str, Tensor] = {}
    for pupil in pupils:
        name = _name(pupil.wanted)
        for key, parameter in pupil.block.named_parameters():
            tensors[f"{name}|{key}|weight"] = parameter.detach()
            for moment, value in pupil.optimizer.state[parameter].items():
                tensors[f"{name}|{key}|{moment}"] = value
    firsts = {_name(pupil.wanted): pupil.first for pupil in pupils}
    write(_made(path.parent) / path.name, tensors, {"step": step, "first": firsts})


def _resume(path: Path, pupils: Sequence[Pupil]) -> int:
    """Put a saved state of these pupils in place; returns the steps done, 0 if there is none."""
    if not path.is_file():
        return 0
    tensors, facts = read(path)
    firsts: Mapping[str, float] = facts["first"]
    if not all(_name(pupil.wanted) in firsts for pupil in pupils):
        # of others; these begin anew, which ends the same
        return 0
    for pupil in pupils:
        name = _name(pupil.wanted)
        pupil.first = firsts[name]
        for key, parameter in pupil.block.named_parameters():
            parameter.data.copy_(tensors[f"{name}|{key}|weight"])
            prefix = f"{name}|{key}|"
            moments = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            del moments["weight"]
            pupil.optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in moments.items()}
    return int(facts["step"])


def _name(wanted: Replacement) -> str:
    return f"{wanted.layer}/{wanted.name}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _losses(folder: Path) -> dict[str, list[float]]:
    path = folder / LOSSES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
