"""What a run minimises: where its batches come from and what their loss is. The loop knows nothing else.

A step of the loop is one update from one or more micro-batches. The loop asks for those of draw 0, 1, 2, ..., which
counts the steps tried so far: batches must depend on nothing but this number, so that resuming is arithmetic.

    gradient of a step = sum over micro-batches of d loss_sum / sum over micro-batches of counted tokens

so unequal micro-batches weigh by their tokens, as in one large batch. An objective may divide by something else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from plait.model.hybrid import Hybrid

B = TypeVar("B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The loss of one micro-batch.

    value: () float32, the summed loss times the `scale` that was asked for; differentiable.
    tokens: how many tokens were counted. metrics: further summed figures, () tensors times the same scale, by name.
    """

    value: Tensor
    tokens: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a micro-batch holds, known before it is computed.

    counted: tokens that enter the loss. tokens: tokens the model reads. keys: attention's visible keys, summed over
    the tokens, for counting FLOPs. weight: its part of what the step's summed loss is divided by; None is `counted`.
    """

    counted: int
    tokens: int
    keys: int
    weight: float | None = None


class Objective(Protocol[B]):
    """Batches and their loss. `batches` and `size` run in a thread."""

    def batches(self, draw: int) -> Sequence[B]:
        """The micro-batches of step `draw`, counted from 0; the same whenever they are asked for."""
        ...

    def size(self, batch: B) -> Size:
        """What the batch holds."""
        ...

    def loss(self, model: Hybrid, batch: B, scale: float) -> Loss:
        """The summed loss of a micro-batch times `scale`."""
        ...

    def sample(self, batch: B) -> tuple[Tensor, Tensor | None]:
        """ids (B, L) that the model reads in a batch, and starts (B, L) of packed documents: for looking inside."""
        ...

    def validation(self) -> Sequence[B]:
        """The batches to validate on; empty if there are none."""
        ...

    def identity(self) -> dict[str, object]:
        """What decides the batches, JSON-ready; a run is not resumed with another."""
        ...

    def state(self) -> dict[str, object]:
        """What else to save, JSON-ready; often there is nothing."""
        ...

    def load_state(self, state: dict[str, object]) -> None:
        """Take what `state` gave."""
        ...


@torch.no_grad()
def mean_loss(model: Hybrid, objective: Objective[B], batches: Sequence[B]) -> float:
    """Mean loss per counted token over batches, nats; one wait for the device at the end.

    Raises: ValueError if no token is counted.
    """
    losses = [objective.loss(model, batch, 1.0) for batch in batches]
    tokens = sum(loss.tokens for loss in losses)
    if not tokens:
        raise ValueError("the validation batches count no token; give a larger validation set")
    return float(torch.stack([loss.value for loss in losses]).double().sum()) / tokens
