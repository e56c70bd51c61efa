"""Distillation: a model learns the next-token distributions of a frozen teacher, and the tokens themselves.

    loss = share tau^2 KL(teacher || student) + (1 - share) cross-entropy,    both at every counted token

It wraps the objective that says what is read, so distillation works on plain text and on conversations alike. For
models that were pruned, and for those that continue in fewer bits.

Source   Hinton et al. 2015, arXiv:1503.02531; Muralidharan et al. 2024, arXiv:2407.14679; formulae in ops/distill.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.train.objective import Loss, Objective, Size


class Distill:
    """An objective's batches with a teacher's distributions as what to learn."""

    def __init__(
        self,
        objective: Objective[Batch],
        teacher: Hybrid,
        *,
        share: float = 1.0,
        temperature: float = 1.0,
        name: str = "teacher",
    ) -> None:
        """
        Args:
            objective: whose batches to learn from, and to validate on.
            teacher: of the same vocabulary, on the student's device; it is frozen here.
            share: of the divergence in the loss, the rest is cross-entropy; 1 learns from the teacher alone.
            temperature: both distributions' logits are divided by it.
            name: which teacher it is, compared when a run is resumed.

        Raises: ValueError for a share or temperature outside its range.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: the divergence's part of the loss lies between 0 and 1")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: must be above 0; 1 compares the models as they are")
        self.objective, self.teacher = objective, teacher.requires_grad_(False).eval()
        self.share, self.temperature, self.name = share, temperature, name

    def batches(self, draw: int) -> Sequence[Batch]:
        """See Objective."""
        return self.objective.batches(draw)

    def size(self, batch: Batch) -> Size:
        """See Objective."""
        return self.objective.size(batch)

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        """The mixture, with both its parts as metrics; without gradients, as in a validation, plain cross-entropy.

        So validation losses compare with those of any other run.
        """
        if not torch.is_grad_enabled():
            return self.objective.loss(model, batch, scale)
        batch = batch.to(model.device)
        with torch.no_grad():
            taught, _ = self.teacher.hidden(batch.ids, starts=batch.starts)
        x, _ = model.hidden(batch.ids, starts=batch.starts)
        found = model.taught_sum(
            x, batch.targets, self.teacher, taught, temperature=self.temperature, share=self.share, scale=scale
        )
        metrics = {"cross_entropy": found.cross_entropy, "divergence": found.divergence}
        return Loss(value=found.loss, tokens=int((batch.targets != IGNORED).sum()), metrics=metrics)

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See Objective."""
        return self.objective.sample(batch)

    def validation(self) -> Sequence[Batch]:
        """See Objective."""
        return self.objective.validation()

    def identity(self) -> dict[str, object]:
        """See Objective."""
        taught = {"teacher": self.name, "share": self.share, "temperature": self.temperature}
        return {**self.objective.identity(), "distill": taught}

    def state(self) -> dict[str, object]:
        """See Objective."""
        return self.objective.state()

    def load_state(self, state: dict[str, object]) -> None:
        """See Objective."""
        self.objective.load_state(state)
