"""One update: gradients of all micro-batches, clipped, applied unless they are not finite or not accepted.

    g = sum over micro-batches of grad loss_sum / counted tokens;   g <- g min(1, clip / |g|);   one optimiser step

The loss and the norm reach Python together, so a step waits for the device once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from plait.model import sigma
from plait.model.hybrid import Hybrid
from plait.train.objective import Objective
from plait.train.optim import Optimizers

B = TypeVar("B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update measured.

    loss: mean per counted token, nats. grad_norm: before clipping. applied: False if it was skipped because one of
    both is not finite, or (spike) because they were not accepted. metrics: means of the objective's further figures.
    """

    loss: float
    grad_norm: float
    applied: bool
    metrics: dict[str, float]
    spike: bool = False


def update(
    model: Hybrid,
    objective: Objective[B],
    batches: Sequence[B],
    counted: int,
    optimizers: Optimizers,
    lr: float,
    accepts: Callable[[float, float], bool] | None = None,
    *,
    decay: float = 1.0,
    weight: float | None = None,
) -> Update:
    """Make one update, or leave parameters and optimiser state as they are.

    Args:
        model: in float32 masters.
        objective: gives the loss of a batch.
        batches: the micro-batches of this step.
        counted: tokens counted in all of them together.
        optimizers: whose gradients are empty.
        lr: learning rate of this update.
        accepts: told the finite loss and gradient norm, says whether to make the update; None makes it.
        decay: share of the optimiser's weight decay.
        weight: what the summed loss is divided by for the gradient; None is `counted`. Losses that are told are always
            means over the counted tokens.

    Returns: see Update. Gradients are empty afterwards.
    """
    sigma.advance(model)
    total: dict[str, Tensor] = {}
    weight = counted if weight is None else weight
    for part, batch in enumerate(batches):
        model.moment.part = part
        loss = objective.loss(model, batch, 1.0 / weight)
        loss.value.backward()
        for name, figure in {"loss": loss.value, **loss.metrics}.items():
            figure = figure.detach()
            total[name] = total[name] + figure if name in total else figure
    gradients = [p.grad for p in optimizers.parameters if p.grad is not None]
    norm = get_total_norm(gradients)
    grad_norm, *figures = torch.stack([norm.float(), *(figure.float() for figure in total.values())]).tolist()
    metrics = {name: figure * (weight / counted) for name, figure in zip(total, figures, strict=True)}
    mean = metrics.pop("loss")
    finite = math.isfinite(mean) and math.isfinite(grad_norm)
    applied = finite and (accepts is None or accepts(mean, grad_norm))
    if applied:
        clip = optimizers.settings.clip
        if 0 < clip < grad_norm:
            for gradient in gradients:
                gradient.mul_(clip / grad_norm)
        optimizers.step(lr, decay)
    optimizers.zero_grad()
    return Update(loss=mean, grad_norm=grad_norm, applied=applied, metrics=metrics, spike=finite and not applied)
