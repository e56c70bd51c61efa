"""The linear layer of every model: float32 or low-precision masters, computed in what its format says.

    y = q_x(x) q_w(W)^T + b

Numbers  the weight is cast to x.dtype at each call, so float32 masters train a bfloat16 model without autocast.
"""

import torch
from torch import Tensor, nn

from plait.ops.linear import linear
from plait.ops.quant import fake_int8, fake_ternary
from plait.precision.format import HIGH, LinearFormat, TensorFormat

QUANTISERS = {
    TensorFormat(element="ternary", scale="tensor"): fake_ternary,
    TensorFormat(element="int8", scale="row"): fake_int8,
}


class Linear(nn.Module):
    """A weight (d_out, d_in), an optional bias, and the numbers they are used in."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, number_format: LinearFormat = HIGH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.number_format = number_format

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out), in x.dtype."""
        w = self.weight
        if self.number_format.weight is not None:
            w = QUANTISERS[self.number_format.weight](w)
        if self.number_format.input is not None:
            x = QUANTISERS[self.number_format.input](x)
        return linear(x, w.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"
