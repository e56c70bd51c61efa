"""Elastic models: one training run, of whose weights several sizes can be cut out, each a good model by itself.

    loss = mean of tau^2 KL(teacher || model_s) over the sizes s of a step: the whole, the smallest, one at random

A size is a plan with scores, as of any pruning: it takes the most important units of each layer, so that smaller sizes
lie inside larger ones. While training, the model of a size is run with slices of the whole model's own parameters, and
its gradients flow back into them. There are no masks: what was trained is bit for bit what a slice cuts out.

    FOLDER/model/                the whole model, a checkpoint like any other, with elastic.json and scores beside it
    plait convert FOLDER/model DST --to hf --slice NAME

Source   Yu and Huang 2019, arXiv:1903.05134 (largest, smallest and random sizes in each step, taught by the largest);
         Taghibakhshi et al. 2025, arXiv:2511.16664 (a frozen teacher for nested hybrids).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait.compress.edits import AT_ONCE
from plait.compress.plan import Plan
from plait.compress.prune import prune
from plait.compress.score import Scores
from plait.config import ConfigError, nearest
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.formats.checkpoint import Checkpoint
from plait.formats.computed import computed
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.model.layers.attention import Attention
from plait.ops.distill import Taught
from plait.precision.recipe import PrecisionRecipe
from plait.train.metrics import write_whole
from plait.train.objective import Loss, Objective, Size

FILE, SCORES = "elastic.json", "elastic-scores"
WHOLE = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """One tensor of a slice. source: the whole model's tensor. index: by dimension, which entries; None for all."""

    source: str
    index: tuple[Tensor | None, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The slice; differentiable."""
        for dim, index in enumerate(self.index):
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor


def takes(checkpoint: Checkpoint, plan: Plan, scores: Scores) -> dict[str, Take]:
    """Which entries of which tensors a plan takes: tensor of the slice -> Take.

    Args:
        checkpoint: only names and shapes of its tensors matter.
        plan, scores: of the slice.

    Raises: ValueError for a plan that does more than take, such as averaging key/value heads or replacing layers.
    """
    for layer, wanted in zip(plan.kept, plan.config.layers, strict=True):
        old = checkpoint.config.layers[layer]
        if isinstance(old, Attention) and isinstance(wanted, Attention):
            if wanted.n_heads // wanted.n_kv_heads > old.n_heads // old.n_kv_heads:
                raise ValueError(
                    f"layer {layer}: {wanted.n_kv_heads} key/value heads for {wanted.n_heads} would be averages of the "
                    "whole model's; a slice can only take entries as they are: take query heads away with them"
                )
    begin, names, probes = 0, [], {}
    for name, tensor in checkpoint.tensors.items():
        probes[name] = _numbered(tensor.shape, begin)
        names.append((begin, name))
        begin += prod(tensor.shape)
    probe = prune(replace(checkpoint, tensors=probes), plan, scores, merge=False, rescale=False)
    starts = torch.tensor([first for first, _ in names])
    found: dict[str, Take] = {}
    for name, tensor in probe.tensors.items():
        places = tensor.read().double()
        first, source = names[int(torch.searchsorted(starts, int(places.flatten()[0]), right=True)) - 1]
        shape = checkpoint.tensors[source].shape
        found[name] = Take(source=source, index=_index(places - first, shape, name))
    return found


def _numbered(shape: Sequence[int], begin: int) -> LazyTensor:
    """A tensor whose entries say which one they are; float64 counts exactly up to 2^53."""
    row = prod(shape[1:])

    def make(first: int, n: int) -> Tensor:
        return torch.arange(begin + first * row, begin + (first + n) * row, dtype=torch.float64).view(n, *shape[1:])

    return computed(tuple(shape), torch.float64, make, max(1, AT_ONCE // max(row, 1)))


def _index(places: Tensor, shape: Sequence[int], name: str) -> tuple[Tensor | None, ...]:
    """For each dimension the entries that flat places in a tensor of this shape come from."""
    index: list[Tensor] = []
    whole = places.round().long()
    rebuilt, step = torch.zeros_like(whole), whole.new_tensor(1)
    for dim in reversed(range(len(shape))):
        line = whole[tuple(slice(None) if at == dim else 0 for at in range(len(shape)))]
        here = (line // step) % shape[dim]
        index.append(here)
        rebuilt += (here * step).view([-1 if at == dim else 1 for at in range(len(shape))])
        step = step * shape[dim]
    if not torch.equal(rebuilt.double(), places):
        raise ValueError(f"{name}: this plan mixes entries of the whole model; a slice can only take them as they are")
    kept = zip(reversed(index), shape, strict=True)
    return tuple(None if torch.equal(here, torch.arange(size)) else here for here, size in kept)


class Sizes:
    """The sizes of an elastic model, by name, largest first."""

    def __init__(self, plans: Mapping[str, Plan], scores: Scores) -> None:
        """Raises: ValueError without a size."""
        if not plans:
            raise ValueError("plans is empty: an elastic model needs at least one size besides the whole")
        self.plans, self.scores = dict(plans), scores

    def slice(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Cut one size out of the whole model.

        Raises: ConfigError for a size that there is not, naming the nearest.
        """
        if name == WHOLE:
            return checkpoint
        if name not in self.plans:
            near = nearest(name, self.plans)
            hint = f"did you mean {near!r}?" if near else f"sizes: {', '.join([WHOLE, *self.plans])}"
            raise ConfigError(f"slice={name!r} is no size of {checkpoint.folder}; {hint}")
        return prune(checkpoint, self.plans[name], self.scores, merge=False, rescale=False)

    def save(self, folder: Path) -> None:
        """Put them beside the tensors of the whole model."""
        self.scores.save(folder / SCORES)
        data = {name: plan.to_dict() for name, plan in self.plans.items()}
        write_whole(folder / FILE, json.dumps(data, indent=1) + "\n")

    @staticmethod
    def open(folder: Path) -> "Sizes":
        """Raises: ConfigError if the checkpoint in the folder is not elastic."""
        if not (folder / FILE).is_file():
            raise ConfigError(
                f"{folder} is no elastic model: {FILE} is not in it; make one with plait compress --elastic"
            )
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        plans = {name: Plan.from_dict(plan) for name, plan in data.items()}
        return Sizes(plans, Scores.load(folder / SCORES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A micro-batch, and which sizes learn from it."""

    batch: Batch
    sizes: tuple[str, ...]


class _Slice(nn.Module):
    """The model of a size, without weights of its own."""

    def __init__(self, config: ModelConfig, recipe: PrecisionRecipe) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Hybrid(config, recipe)

    def forward(self, batch: Batch, teacher: Hybrid, taught: Tensor, temperature: float, scale: float) -> Taught:
        x, _ = self.model.hidden(batch.ids, starts=batch.starts)
        return self.model.taught_sum(x, batch.targets, teacher, taught, temperature=temperature, scale=scale)


class Elastic:
    """An objective's batches with a frozen teacher's distributions for several sizes of one model."""

    def __init__(
        self,
        objective: Objective[Batch],
        teacher: Hybrid,
        checkpoint: Checkpoint,
        sizes: Sizes,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        name: str = "teacher",
    ) -> None:
        """
        Args:
            objective: whose batches to learn from, and to validate on.
            teacher: frozen here; often the whole model as it was.
            checkpoint: the whole model: names and shapes of its tensors.
            sizes: what shall be cut out of it later.
            seed: of the sizes that are drawn.
            temperature: of the distributions.
            name: which teacher it is, compared when a run is resumed.
        """
        self.objective, self.teacher, self.sizes = objective, teacher.requires_grad_(False).eval(), sizes
        self.seed, self.temperature, self.name = seed, temperature, name
        self.takes = {name: takes(checkpoint, plan, sizes.scores) for name, plan in sizes.plans.items()}
        self.slices: dict[str, _Slice] = {}

    def names(self, draw: int) -> tuple[str, ...]:
        """The sizes of a step: the whole, the smallest, and one between them."""
        *between, smallest = self.sizes.plans
        drawn = random.Random(f"{self.seed} {draw}").choice(between) if between else None
        return (WHOLE, smallest) if drawn is None else (WHOLE, drawn, smallest)

    def batches(self, draw: int) -> Sequence[Sized]:
        """See Objective."""
        return [Sized(batch=batch, sizes=self.names(draw)) for batch in self.objective.batches(draw)]

    def size(self, batch: Sized | Batch) -> Size:
        """See Objective; tokens count once, whatever the number of sizes."""
        return self.objective.size(_plain(batch))

    def loss(self, model: Hybrid, batch: Sized | Batch, scale: float) -> Loss:
        """The mean of the sizes' divergences; without gradients, the whole model's cross-entropy."""
        if isinstance(batch, Batch) or not torch.is_grad_enabled():
            return self.objective.loss(model, _plain(batch), scale)
        read = batch.batch.to(model.device)
        with torch.no_grad():
            taught, _ = self.teacher.hidden(read.ids, starts=read.starts)
        n, found = len(batch.sizes), {}
        for name in batch.sizes:
            found[name] = self._of(model, name, read, taught, scale / n)
        metrics = {f"{name} divergence": one.divergence * n for name, one in found.items()}
        metrics["divergence"] = torch.stack([one.divergence for one in found.values()]).sum()
        value = torch.stack([one.loss for one in found.values()]).sum()
        return Loss(value=value, tokens=int((read.targets != IGNORED).sum()), metrics=metrics)

    def _of(self, model: Hybrid, name: str, read: Batch, taught: Tensor, scale: float) -> Taught:
        how = read, self.teacher, taught, self.temperature, scale
        if name == WHOLE:
            x, _ = model.hidden(read.ids, starts=read.starts)
            return model.taught_sum(x, read.targets, self.teacher, taught, temperature=self.temperature, scale=scale)
        if name not in self.slices:
            self.slices[name] = _Slice(self.sizes.plans[name].config, model.recipe)
        one = self.slices[name]
        # what rounds at random, or little by little, asks where the training stands
        for field in ("seed", "draw", "part", "is_late", "share"):
            setattr(one.model.moment, field, getattr(model.moment, field))
        whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = {f"model.{at}": take.of(whole[take.source]) for at, take in self.takes[name].items()}
        return functional_call(one, tensors, how)

    def sample(self, batch: Sized | Batch) -> tuple[Tensor, Tensor | None]:
        """See Objective."""
        return self.objective.sample(_plain(batch))

    def validation(self) -> Sequence[Batch]:
        """See Objective."""
        return self.objective.validation()

    def identity(self) -> dict[str, object]:
        """See Objective."""
        plans = {name: plan.to_dict() for name, plan in self.sizes.plans.items()}
        how = {"teacher": self.name, "temperature": self.temperature, "seed": self.seed, "sizes": plans}
        return {**self.objective.identity(), "elastic": json.dumps(how, sort_keys=True)}

    def state(self) -> dict[str, object]:
        """See Objective."""
        return self.objective.state()

    def load_state(self, state: dict[str, object]) -> None:
        """See Objective."""
        self.objective.load_state(state)


def _plain(batch: Sized | Batch) -> Batch:
    return batch.batch if isinstance(batch, Sized) else batch
