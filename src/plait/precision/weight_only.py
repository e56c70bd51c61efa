"""A linear layer whose weight is held as int8 or int4 codes: a half or a quarter of bfloat16's bytes to read per token.

    y = x W^T + b;    W ~ scale * (code - zero), one scale for `group` neighbours of a row

For inference: codes have no gradient, and asking for one is an error that says what to do instead.

Numbers  activations stay as they are, products are summed in float32; layout of codes in ops/quant.py.
"""

import torch
from torch import Tensor, nn

from plait.ops.quant import dequantize_groups, quantize_groups, weight_only_linear
from plait.precision.format import TensorFormat
from plait.precision.linear import Linear

# endings of the names of what such a weight consists of; kept as they are, whatever dtype the rest is stored in
CODED = (".codes", ".scales", ".zeros")


class WeightOnlyLinear(nn.Module):
    """codes (N, K) or packed (N, K / 2), scales (N, K / group) float16, zeros (N, K / group) uint8 or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, weight: TensorFormat, role: str = "") -> None:
        super().__init__()
        self.form, self.role = weight, role
        self.bits, self.group = weight.bits, weight.group
        code = torch.int8 if self.bits == 8 and not weight.zeros else torch.uint8
        groups = (d_out, d_in // self.group)
        self.register_buffer("codes", torch.empty(d_out, d_in * self.bits // 8, dtype=code))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.float16))
        self.register_buffer("zeros", torch.empty(groups, dtype=torch.uint8) if weight.zeros else None)
        self.register_buffer("bias", torch.empty(d_out) if bias else None)

    @property
    def weight(self) -> Tensor:
        """(N, K) float32, what the codes stand for; made anew at each call."""
        return dequantize_groups(self.codes, self.scales, self.zeros, bits=self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def quantize(self, w: Tensor) -> None:
        """Take the codes of an (N, K) weight; ValueError for numbers that no scale can hold."""
        self.codes, self.scales, self.zeros = quantize_groups(w, self.bits, self.group, self.zeros is not None)

    def take_bias(self, bias: Tensor) -> None:
        """Take the (N,) bias of the layer that the codes were made from."""
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in x.dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Refusing.apply(x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without a thought of gradients."""
        return weight_only_linear(x, self.codes, self.scales, self.zeros, self.bias, bits=self.bits, group=self.group)

    def extra_repr(self) -> str:
        N, K = self.codes.shape[0], self.scales.shape[1] * self.group
        zeros = ", zero points" if self.zeros is not None else ""
        return f"{K} -> {N}, int{self.bits}, group={self.group}{zeros}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # torch's own signature
        # `model.to(dtype)` is for numbers; scales keep their dtype whatever the model computes in
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


def hold_as_codes(module: nn.Module, like: nn.Module, inside: str, dtype: torch.dtype) -> None:
    """Replace the linear layers of a module by codes of their weights wherever its twin has codes.

    Args:
        module: with the weights; changed in place.
        like: the same model on meta, of a weight-only recipe; its layers are filled and move over.
        inside: name of the part to change.
        dtype: of biases.
    """
    for name, layer in list(like.get_submodule(inside).named_modules(prefix=inside)):
        if isinstance(layer, WeightOnlyLinear):
            master = module.get_submodule(name)
            assert isinstance(master, Linear)
            layer.quantize(master.weight)
            if master.bias is not None:
                layer.take_bias(master.bias.detach().to(dtype))
            module.set_submodule(name, layer)


class _Refusing(torch.autograd.Function):
    """The product, and an error in place of its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor, layer: WeightOnlyLinear) -> Tensor:
        return layer.product(x)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "no gradient passes through weights held as codes; train the model that they were made from "
            "(recipe 'bf16', 'fp32' or 'ternary') and quantise the result, or run this one under torch.no_grad()"
        )
