"""Supervised fine-tuning: next-token prediction of what the assistant says, and of nothing else.

    mean        loss = sum of all counted tokens / their number           tokens weigh alike
    sequence    loss = sum of all counted tokens / conversations          long answers weigh more, whatever is packed
    sum         loss = sum of all counted tokens                          BitNet's: steps with more to say move more

of a whole step, however many micro-batches it has. Losses are always told as means over tokens. A sum is as large as
there are tokens: clip it at a norm of that size, or not at all.

Source   Ma et al. 2025, arXiv:2504.12285 section 3.2 (sum instead of mean, with larger rates and more epochs).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from plait.data.conversations import Conversations
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.train.objective import Size
from plait.train.pretrain import NextToken

Reduction = Literal["mean", "sequence", "sum"]


class SFT(NextToken):
    """Cross-entropy of the assistant's tokens over packed conversations."""

    def __init__(
        self,
        conversations: Conversations,
        *,
        reduction: Reduction = "mean",
        accumulate: int = 1,
        validation: Conversations | None = None,
        validation_batches: int | None = None,
        identity: Mapping[str, object] | None = None,
    ) -> None:
        """Arguments are those of NextToken. reduction: see the file."""
        super().__init__(
            conversations,
            accumulate=accumulate,
            validation=validation,
            validation_batches=validation_batches,
            identity={"conversations": conversations.identity, **(identity or {})},
        )
        self.reduction = reduction

    def size(self, batch: Batch) -> Size:
        """See Objective."""
        size = super().size(batch)
        if self.reduction == "sum":
            # the parts of a step weigh 1 together
            return replace(size, weight=1.0 / self.accumulate)
        return replace(size, weight=float(_answered(batch))) if self.reduction == "sequence" else size

    def identity(self) -> dict[str, object]:
        """See Objective."""
        return {**super().identity(), "objective": "sft", "reduction": self.reduction}


def _answered(batch: Batch) -> int:
    """Conversations in which something counts."""
    documents = batch.starts.flatten().long().cumsum(0)
    return int(documents[batch.targets.flatten() != IGNORED].unique().numel())
