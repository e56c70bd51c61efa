"""Next-token prediction: every token of a packed batch predicts the one after it in its document."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.train.objective import Loss, Size


class Rows(Protocol):
    """Where batches come from: a Loader, or what gives batches as it does."""

    batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        ...

    def n_steps_per_epoch(self) -> int:
        """Steps after which everything was met once."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        ...


class NextToken:
    """Cross-entropy of the next token over a loader's batches."""

    def __init__(
        self,
        loader: Rows,
        *,
        accumulate: int = 1,
        validation: Rows | None = None,
        validation_batches: int | None = None,
        identity: Mapping[str, object] | None = None,
        bad_batches: Collection[int] = (),
    ) -> None:
        """
        Args:
            loader: its batch number s is what step s trains on.
            accumulate: micro-batches that each batch is cut into, one in memory at a time.
            validation: other data, made with repeat=False; None for no validation.
            validation_batches: how many batches of it, always the first ones; None is all of it.
            identity: what decides the loader's batches, JSON-ready; compared when a run is resumed.
            bad_batches: draws whose tokens are replaced by random ones, to see how a run bears them.

        Raises: ValueError if the loader's rows do not divide by `accumulate`.
        """
        if accumulate < 1 or loader.batch_size % accumulate:
            raise ValueError(f"accumulate={accumulate} does not divide the batch of {loader.batch_size} rows")
        self.loader, self.accumulate = loader, accumulate
        self._identity = dict(identity or {})
        self.bad_batches = frozenset(bad_batches)
        if self.bad_batches:
            self._identity["bad_batches"] = sorted(self.bad_batches)
        self._validation: list[Batch] = []
        if validation is not None:
            n = validation.n_steps_per_epoch()
            n = n if validation_batches is None else min(n, validation_batches)
            self._validation = [validation.batch(i) for i in range(n)]

    def batches(self, draw: int) -> Sequence[Batch]:
        """See Objective."""
        batch = self.loader.batch(draw)
        return (_damaged(batch, draw) if draw in self.bad_batches else batch).split(self.accumulate)

    def size(self, batch: Batch) -> Size:
        """Counts the tokens that predict something; a token sees itself and those before it in its document."""
        steps = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        begin = (steps * batch.starts).cummax(1).values
        counted, tokens = int((batch.targets != IGNORED).sum()), batch.ids.numel()
        return Size(counted=counted, tokens=tokens, keys=int((steps - begin).sum()) + tokens)

    def loss(self, model: Hybrid, batch: Batch, scale: float) -> Loss:
        """See Objective."""
        tokens = int((batch.targets != IGNORED).sum())
        batch = batch.to(model.device)
        x, _ = model.hidden(batch.ids, starts=batch.starts)
        return Loss(value=model.loss_sum(x, batch.targets, scale=scale), tokens=tokens)

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Objective."""
        return batch.ids, batch.starts

    def validation(self) -> Sequence[Batch]:
        """See Objective."""
        return self._validation

    def identity(self) -> dict[str, object]:
        """See Objective."""
        return {**self._identity, "objective": "next-token", "accumulate": self.accumulate}

    def state(self) -> dict[str, object]:
        """Nothing: batches follow from their number."""
        return {}

    def load_state(self, state: dict[str, object]) -> None:
        """Nothing to take."""


def _damaged(batch: Batch, draw: int) -> Batch:
    """A batch of the same shape and documents whose tokens are drawn at random, from those up to its largest."""
    generator = torch.Generator().manual_seed(draw)
    n_rows, length = batch.ids.shape
    ids = torch.randint(int(batch.ids.max()) + 1, (n_rows, length + 1), generator=generator)
    targets = torch.where(batch.targets == IGNORED, IGNORED, ids[:, 1:])
    return Batch(ids=ids[:, :-1].contiguous(), targets=targets, starts=batch.starts)
