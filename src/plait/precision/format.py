"""What numbers an operand is held in: plain data, read by the linear layers.

A TensorFormat says how one tensor is rounded before a matrix product; a LinearFormat says it for the operands of a
linear layer. `None` means the tensor is used in the compute dtype as it is.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFormat:
    """element: the number format of a code; scale: what shares one scale.

    group: with scale "group", how many neighbours of a row share one. zeros: each group has a zero point too. Such
    weights are held as codes and have no master; the other formats round a master at each use.
    """

    element: Literal["ternary", "int8", "int4"]
    scale: Literal["tensor", "row", "group"]
    group: int = 0
    zeros: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code as it is held."""
        return 4 if self.element == "int4" else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """Formats of the input and the weight of y = x W^T; None computes in the model's dtype."""

    input: TensorFormat | None = None
    weight: TensorFormat | None = None


HIGH = LinearFormat()
