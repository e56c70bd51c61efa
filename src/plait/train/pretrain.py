"""Next-token prediction: every token of a packed batch predicts the one after it in its document."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from plait.model.hybrid import Hybrid
from plait.ops.loss import IGNORED
from plait.train.objective import Loss, Size


class Packed(Protocol):
    """B rows of L tokens with the facts that training needs; `plait.data` gives such batches.

    ids: (B, L) int64. targets: (B, L) int64, the token each one must predict, -100 where none counts. starts: (B, L)
    bool, True at the first token of each document, or None for one document per row.
    """

    @property
    def ids(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def starts(self) -> Tensor | None: ...


class Source(Protocol):
    """Where batches come from, by number; the same number gives the same batch."""

    def batch(self, step: int) -> Packed: ...
    def identity(self) -> dict[str, object]: ...


class NextToken:
    """Cross-entropy of the next token; micro-batch m of step s is the source's batch number s x accumulate + m."""

    def __init__(
        self, source: Source, *, accumulate: int = 1, validation: Source | None = None, validation_batches: int = 8
    ) -> None:
        """
        Args:
            source: training batches.
            accumulate: micro-batches per step, as in TrainConfig.
            validation: other batches, or None for no validation.
            validation_batches: how many of them; always the same ones.
        """
        self.source, self.accumulate = source, accumulate
        self._validation = [] if validation is None else [validation.batch(i) for i in range(validation_batches)]

    def batch(self, draw: int, micro: int) -> Packed:
        """See Objective."""
        return self.source.batch(draw * self.accumulate + micro)

    def size(self, batch: Packed) -> Size:
        """Counts the tokens that predict something; a token sees itself and those before it in its document."""
        steps = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        begin = torch.zeros_like(steps) if batch.starts is None else (steps * batch.starts).cummax(1).values
        counted, tokens = int((batch.targets != IGNORED).sum()), batch.ids.numel()
        return Size(counted=counted, tokens=tokens, keys=int((steps - begin).sum()) + tokens)

    def loss(self, model: Hybrid, batch: Packed, scale: float) -> Loss:
        """See Objective."""
        ids, targets, starts = (
            None if t is None else t.to(model.device, non_blocking=True)
            for t in (batch.ids, batch.targets, batch.starts)
        )
        assert ids is not None and targets is not None
        x, _ = model.hidden(ids, starts=starts)
        return Loss(
            value=model.loss_sum(x, targets, scale=scale), tokens=int((batch.targets != IGNORED).sum()), metrics={}
        )

    def validation(self) -> Sequence[Packed]:
        """See Objective."""
        return self._validation

    def identity(self) -> dict[str, object]:
        """What decides the batches."""
        return {"source": self.source.identity(), "objective": "next-token"}

    def state(self) -> dict[str, object]:
        """Nothing: batches follow from their number."""
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        """Nothing to take."""
