"""The three products of a linear layer as one call that torch.compile does not look into.

The compiler would make each step's random seeds a program of their own, and take the formats that it finds in one layer
for all layers' own.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from plait.precision.three import Call, three_gemms


class Layer(Protocol):
    """What is asked of a linear layer."""

    weight: nn.Parameter

    def call(self) -> Call:
        """What the three products need to know at this moment."""
        ...


def _three_gemms_of(layer: Layer, x: Tensor) -> Tensor:
    return three_gemms(x, layer.weight, layer.call())


three_gemms_of: Callable[[Layer, Tensor], Tensor] = torch.compiler.disable(_three_gemms_of)  # type: ignore[assignment]
