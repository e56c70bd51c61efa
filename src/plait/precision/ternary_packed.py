"""A linear layer whose weight is held as packed ternary codes: two bits a weight, an eighth of bfloat16's bytes.

    y = (int8(x) w^T) * (dx * dw) + b           for the rows that are ternary
    y = x W^T + b                               for trailing rows that stay high (dt of Mamba-2's input projection)

What it computes is what a trained `ternary` layer computes, its integer part bit for bit; for inference only.

Shapes   K inputs, n ternary outputs, then n_high others; layout of codes in ops/ternary.py.
Numbers  activations are rounded to int8 per token, scales are one per output in float32: the rows of one weight, or of
         one segment of a fused weight, share a value.
Source   Ma et al. 2025, arXiv:2504.12285 section 2.
"""

import torch
from torch import Tensor, nn

from plait.ops.linear import linear
from plait.ops.quant import quantize_ternary
from plait.ops.ternary import pack_ternary, packed_width, ternary_linear, unpack_ternary
from plait.precision.format import LinearFormat
from plait.precision.linear import Parts
from plait.precision.weight_only import WeightOnlyLinear


class TernaryLinear(WeightOnlyLinear):
    """codes (n, 64 ceil(K / 256)) uint8, scales (n,) float32; high: a plain linear layer of the rows after them."""

    high: nn.Linear | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        form: LinearFormat,
        role: str = "",
        parts: Parts = (),
    ) -> None:
        nn.Module.__init__(self)
        assert form.weight is not None
        self.form, self.role, self.d_in, self.bits = form.weight, role, d_in, 2
        self.parts = parts
        self.segments = tuple(rows for name, rows in parts if name not in form.high) or (d_out,)
        n = sum(self.segments)
        self.register_buffer("codes", torch.empty(n, packed_width(d_in), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(n, dtype=torch.float32))
        self.zeros = None
        self.register_buffer("bias", torch.empty(n) if bias else None)
        # no weights are drawn here
        high = nn.utils.skip_init(nn.Linear, d_in, d_out - n, bias=bias) if d_out > n else None
        assert high is None or isinstance(high, nn.Linear)
        self.high = high

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.codes.shape[0] + (0 if self.high is None else self.high.out_features), self.d_in

    @property
    def weight(self) -> Tensor:
        """(N, K) float32, what the codes stand for, and the high rows; made anew at each call."""
        w = unpack_ternary(self.codes, self.d_in) * self.scales[:, None]
        return w if self.high is None else torch.cat([w, self.high.weight.to(w)])

    @torch.no_grad()
    def quantize(self, w: Tensor) -> None:
        """Take the codes of an (N, K) weight, each segment by its own mean magnitude."""
        n = sum(self.segments)
        self.codes, self.scales = quantize_segments(w[:n], self.segments)
        if self.high is not None:
            self.high.weight = nn.Parameter(w[n:].detach().clone(), requires_grad=False)

    def take_bias(self, bias: Tensor) -> None:
        """Take the (N,) bias of a layer that these codes were made from."""
        n = sum(self.segments)
        self.bias = bias[:n].clone()
        if self.high is not None:
            self.high.bias = nn.Parameter(bias[n:].clone(), requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without a thought of gradients."""
        y = ternary_linear(x, self.codes, self.scales, self.bias)
        if self.high is None:
            return y
        bias = self.high.bias
        high = linear(x, self.high.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return torch.cat([y, high], dim=-1)

    def extra_repr(self) -> str:
        N, K = self.shape
        return f"{K} -> {N}, ternary, segments={self.segments}, bias={self.bias is not None}"


def quantize_segments(w: Tensor, segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Packed codes (n, 64 ceil(K / 256)) and scales (n,) of an (n, K) weight whose segments have a scale each."""
    found = [quantize_ternary(part) for part in w.detach().split(segments)]
    codes = torch.cat([pack_ternary(codes) for codes, _ in found])
    scales = torch.cat([scale.expand(rows) for (_, scale), rows in zip(found, segments, strict=True)])
    return codes, scales
