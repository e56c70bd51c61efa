"""Distillation: a model learns the next-token distributions of a frozen teacher, and the tokens themselves.

    loss = share tau^2 KL(teacher || student) + (1 - share) cross-entropy + weight streams,    at every counted token
    streams = mean over pairs (i, j) of layers of |x_i - y_j[channels]|^2 / |y_j[channels]|^2

It wraps the objective that says what is read, so distillation works on plain text and on conversations alike. For
models that were pruned, and for those that continue in fewer bits. The teacher sits in memory (`Distill`), in as few
bits as its precision has, or has answered before (`DistillAnswers`, train/answers.py).

`streams` compares the residual stream x_i of the student after i layers with y_j of the teacher. Where the student is
narrower, its channels are some of the teacher's: those are selected, so that the term is zero for a part that was cut
out unchanged, and nothing has to be learnt that the model itself does not keep.

Source   Hinton et al. 2015, arXiv:1503.02531; Muralidharan et al. 2024, arXiv:2407.14679; formulae in ops/distill.py
         and, with answers from a disk, ops/distill_top.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.train.answers import Answered, Answers
from plait.train.objective import Loss, Objective, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """What of the teacher's residual stream the student should meet, besides its answers.

    weight: of this term in the loss. pairs: (student, teacher), how many layers lie before the streams that are
    compared. channels: which of the teacher's channels are the student's, in order; None is all.
    """

    weight: float
    pairs: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: what the streams weigh in the loss must be 0 or more")
        if not self.pairs:
            raise ValueError("pairs is empty: name at least one pair of layers, (student, teacher)")

    def check(self, student: Hybrid, teacher: Hybrid) -> None:
        """Raises: ValueError for layers or channels that the models do not have."""
        depths = len(student.blocks), len(teacher.blocks)
        for pair in self.pairs:
            if any(not 0 <= i <= depth for i, depth in zip(pair, depths, strict=True)):
                raise ValueError(f"pairs: {pair} names streams of models with {depths[0]} and {depths[1]} layers")
        wide = teacher.config.d_model
        channels = tuple(range(wide)) if self.channels is None else self.channels
        if len(channels) != student.config.d_model or any(not 0 <= c < wide for c in channels):
            raise ValueError(
                f"channels: {len(channels)} of the teacher's {wide} channels cannot be the student's "
                f"{student.config.d_model}; name one of the teacher's for each of the student's"
            )

    def distance(self, student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
        """() float32, the term summed over the counted positions, before its weight."""
        total = torch.zeros((), device=counted.device)
        for i, j in self.pairs:
            x, y = student[i][counted].float(), teacher[j][counted].float()
            if self.channels is not None:
                y = y[:, torch.tensor(self.channels, device=y.device)]
            total = total + ((x - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).sum()
        return total / len(self.pairs)


class _Wrapped:
    """An objective's batches with another loss: what both kinds of distillation share."""

    def __init__(self, objective: Objective[Batch], share: float, temperature: float, name: str) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: the divergence's part of the loss lies between 0 and 1")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: must be above 0; 1 compares the models as they are")
        self.objective, self.share, self.temperature, self.name = objective, share, temperature, name

    def validation(self) -> Sequence[Batch]:
        """See Objective."""
        return self.objective.validation()

    def state(self) -> dict[str, object]:
        """See Objective."""
        return self.objective.state()

    def load_state(self, state: dict[str, object]) -> None:
        """See Objective."""
        self.objective.load_state(state)

    def _identity(self, **more: object) -> dict[str, object]:
        taught = {"teacher": self.name, "share": self.share, "temperature": self.temperature, **more}
        return {**self.objective.identity(), "distill": taught}


class Distill(_Wrapped):
    """An objective's batches with a teacher's distributions as what to learn."""

    def __init__(
        self,
        objective: Objective[Batch],
        teacher: Hybrid,
        *,
        share: float = 1.0,
        temperature: float = 1.0,
        name: str = "teacher",
        streams: Streams | None = None,
    ) -> None:
        """
        Args:
            objective: whose batches to learn from, and to validate on.
            teacher: of the same vocabulary, on the student's device; it is frozen here. Any precision will do.
            share: of the divergence in the loss, the rest is cross-entropy; 1 learns from the teacher alone.
            temperature: both distributions' logits are divided by it.
            name: which teacher it is, compared when a run is resumed.
            streams: what else to learn from it.

        Raises: ValueError for a share or temperature outside its range.
        """
        super().__init__(objective, share, temperature, name)
        self.teacher, self.streams = teacher.requires_grad_(False).eval(), streams

    def batches(self, draw: int) -> Sequence[Batch]:
        """See Objective."""
        return self.objective.batches(draw)

    def size(self, batch: Batch) -> Size:
        """See Objective."""
        return self.objective.size(batch)

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        """The mixture, with its parts as metrics; without gradients, as in a validation, plain cross-entropy.

        So validation losses compare with those of any other run.
        """
        if not torch.is_grad_enabled():
            return self.objective.loss(model, batch, scale)
        batch, looks = batch.to(model.device), self.streams is not None
        with torch.no_grad():
            taught, theirs = self.teacher.hidden(batch.ids, starts=batch.starts, keeps_all=looks)
        x, ours = model.hidden(batch.ids, starts=batch.starts, keeps_all=looks)
        found = model.taught_sum(
            x, batch.targets, self.teacher, taught, temperature=self.temperature, share=self.share, scale=scale
        )
        counted = batch.targets != IGNORED
        value, metrics = found.loss, {"cross_entropy": found.cross_entropy, "divergence": found.divergence}
        if self.streams is not None:
            self.streams.check(model, self.teacher)
            distance = self.streams.distance(ours, theirs, counted) * scale
            value = value + self.streams.weight * distance
            metrics["streams"] = distance.detach()
        return Loss(value=value, tokens=int(counted.sum()), metrics=metrics)

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See Objective."""
        return self.objective.sample(batch)

    def identity(self) -> dict[str, object]:
        """See Objective."""
        return self._identity() if self.streams is None else self._identity(streams=asdict(self.streams))


class DistillAnswers(_Wrapped):
    """An objective's batches with what a teacher said about them before: it need not be in memory any more."""

    def __init__(self, objective: Objective[Batch], answers: Answers, *, share: float = 1.0) -> None:
        """
        Args:
            objective: the one that the answers were given to, or one that draws the same batches.
            answers: of the teacher.
            share: of the divergence in the loss, the rest is cross-entropy.

        Raises: ValueError if the answers are to other batches, or for a share outside its range.
        """
        super().__init__(objective, share, answers.temperature, answers.teacher)
        answers.check(objective)
        self.answers = answers

    def batches(self, draw: int) -> Sequence[Answered]:
        """See Objective; after the last draw with answers comes the first again."""
        draw %= self.answers.draws
        kept = self.answers.of(draw)
        return [
            Answered(batch=batch, answer=one) for batch, one in zip(self.objective.batches(draw), kept, strict=True)
        ]

    def size(self, batch: Answered | Batch) -> Size:
        """See Objective."""
        return self.objective.size(_plain(batch))

    def loss(self, model: Hybrid, batch: Answered | Batch, scale: float) -> Loss:
        """See Distill."""
        if isinstance(batch, Batch) or not torch.is_grad_enabled():
            return self.objective.loss(model, _plain(batch), scale)
        answer, read = batch.answer.to(model.device), batch.batch.to(model.device)
        x, _ = model.hidden(read.ids, starts=read.starts)
        told = answer.ids, answer.log_p, answer.log_rest
        found = model.told_sum(x, read.targets, told, temperature=self.temperature, share=self.share, scale=scale)
        metrics = {"cross_entropy": found.cross_entropy, "divergence": found.divergence}
        return Loss(value=found.loss, tokens=int((read.targets != IGNORED).sum()), metrics=metrics)

    def sample(self, batch: Answered | Batch) -> tuple[Tensor, Tensor | None]:
        """See Objective."""
        return self.objective.sample(_plain(batch))

    def identity(self) -> dict[str, object]:
        """See Objective."""
        return self._identity(kept=self.answers.k, draws=self.answers.draws)


def _plain(batch: Answered | Batch) -> Batch:
    return batch.batch if isinstance(batch, Answered) else batch
