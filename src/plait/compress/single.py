"""What each replacement costs in quality: the teacher with this one layer exchanged, against the teacher.

    harm of a replacement = mean over tokens of KL(teacher || teacher with the replacement),   and the rise of the loss

The layers before the exchanged one are the teacher's: their output is kept and shared, so that replacing layer i runs
only the layers from i on, and the whole library costs about half a forward pass for each of its members.

Shapes   two streams of (tokens x D) numbers in the compute dtype are held for all of the text.
Source   Bercovich et al. 2024, arXiv:2411.19146 section 4 (scores by single replacement).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.compress.local import listening
from plait.compress.replace import KEEP, Library, Replacement, learnt, plain
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Block, Hybrid
from plait.model.layer import Span
from plait.ops.distill import distillation
from plait.train.metrics import write_whole

FILE = "single.json"
# replacements scored, and in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """Nats per token: kl from the teacher's distributions; loss, how much the cross-entropy rises."""

    kl: float
    loss: float


Table = Mapping[tuple[int, str], Harm]


@torch.no_grad()
def score_library(
    teacher: Hybrid,
    replacements: Library,
    weights: Path,
    batches: Sequence[Batch],
    folder: Path,
    *,
    progress: Progress | None = None,
) -> dict[tuple[int, str], Harm]:
    """The harm of every replacement that is not the layer itself, which has none.

    Args:
        teacher: as it is. replacements: of each of its layers.
        weights: the folder that `teach` filled.
        batches: text that the scores have not read.
        folder: gets single.json, layer by layer; one of the same inputs is continued.
        progress: called after every replacement.
    """
    held = _read(folder / FILE)
    wanted = [r for row in replacements for r in row if r.name != KEEP]
    n_done, recipe = len(held), plain(teacher)
    last = max((r.layer for r in wanted if _name(r) not in held), default=-1)
    texts = [_Text.of(teacher, batch) for batch in batches] if last >= 0 else []
    base = sum(text.loss for text in texts)
    tokens = sum(text.tokens for text in texts)
    for i, block in enumerate(teacher.blocks[: last + 1]):
        for r in replacements[i]:
            if r.name == KEEP or _name(r) in held:
                continue
            other = None if r.spec is None else learnt(teacher.config, r, weights, recipe).to(teacher.device)
            sums = torch.zeros(2, dtype=torch.float64)
            for text in texts:
                sums += text.harm(teacher, i, other)
            held[_name(r)] = Harm(kl=max(float(sums[0]) / tokens, 0.0), loss=(float(sums[1]) - base) / tokens)
            n_done += 1
            if progress is not None:
                progress(n_done, len(wanted))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps({name: asdict(harm) for name, harm in held.items()}, indent=1) + "\n")
        for text in texts:
            text.x = block(text.x, text.span)
    return {(r.layer, r.name): Harm(kl=0.0, loss=0.0) if r.name == KEEP else held[_name(r)] for r in _all(replacements)}


@torch.no_grad()
def harm_of(teacher: Hybrid, model: Hybrid, batches: Sequence[Batch]) -> Harm:
    """The harm of a whole model of the teacher's vocabulary."""
    sums, base, tokens = torch.zeros(2, dtype=torch.float64), 0.0, 0
    for batch in batches:
        text = _Text.of(teacher, batch)
        x, _ = model.hidden(text.batch.ids, starts=text.batch.starts)
        sums += _against(teacher, text, x, model.head_weight)
        base, tokens = base + text.loss, tokens + text.tokens
    return Harm(kl=max(float(sums[0]) / tokens, 0.0), loss=(float(sums[1]) - base) / tokens)


@dataclass(slots=True, kw_only=True)
class _Text:
    """A batch on its way: x, what enters the next layer; span, as layers take it; final, the teacher's last states."""

    batch: Batch
    x: Tensor
    span: Span
    final: Tensor
    loss: float
    tokens: int

    @staticmethod
    def of(teacher: Hybrid, batch: Batch) -> "_Text":
        batch = batch.to(teacher.device)
        first: list[tuple[Tensor, Span]] = []
        with listening(teacher, lambda i, x, span, _: first.append((x, span)) if i == 0 else None):
            final, _ = teacher.hidden(batch.ids, starts=batch.starts)
        loss = float(teacher.loss_sum(final, batch.targets))
        tokens = int((batch.targets != IGNORED).sum())
        return _Text(batch=batch, x=first[0][0], span=first[0][1], final=final, loss=loss, tokens=tokens)

    def harm(self, teacher: Hybrid, layer: int, other: Block | None) -> Tensor:
        """(2,) summed divergence and cross-entropy with another block, or none, for a layer."""
        x = self.x if other is None else other(self.x, self.span)
        for block in teacher.blocks[layer + 1 :]:
            x = block(x, self.span)
        return _against(teacher, self, teacher.norm(x).to(teacher.recipe.compute), teacher.head_weight)


def _against(teacher: Hybrid, text: _Text, x: Tensor, head: Tensor) -> Tensor:
    found = distillation(
        x.flatten(0, 1), head, text.final.flatten(0, 1), teacher.head_weight, text.batch.targets.flatten()
    )
    return torch.stack([found.divergence, found.cross_entropy]).double().cpu()


def _all(replacements: Library) -> list[Replacement]:
    return [r for row in replacements for r in row]


def _name(wanted: Replacement) -> str:
    return f"{wanted.layer}/{wanted.name}"


def _read(path: Path) -> dict[str, Harm]:
    if not path.is_file():
        return {}
    return {name: Harm(**found) for name, found in json.loads(path.read_text(encoding="utf-8")).items()}
