"""What numbers an operand is held in: plain data, read by Linear.

A TensorFormat says how one tensor is rounded before a matrix product; a LinearFormat says it for the operands of a
linear layer. `None` means the tensor is used in the compute dtype as it is.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFormat:
    """element: the number format of a code; scale: what shares one scale."""

    element: Literal["ternary", "int8"]
    scale: Literal["tensor", "row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """Formats of the input and the weight of y = x W^T; None computes in the model's dtype."""

    input: TensorFormat | None = None
    weight: TensorFormat | None = None


HIGH = LinearFormat()
