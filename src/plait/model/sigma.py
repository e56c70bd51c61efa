"""Sigma-reparametrisation: a linear layer whose weight always has the spectral norm that one learned number says.

    y = (gamma / sigma) x W^T + b        sigma = left . W right, nearly the largest singular value of W
    left <- W right / |W right|,  right <- W^T left / |W^T left|        power iteration, once per training step

The two vectors are buffers: saved with the model, moved by `advance` before a step and by nothing else, so that a run
resumed, or a block run twice in the backward pass, sees the same numbers. W's gradient goes through sigma; the vectors
count as constants, as at the exact singular vectors they may.

Shapes   W (d_out, d_in), left (d_out,), right (d_in,).
Numbers  sigma, gamma and the vectors in float32; the product as the inner layer computes it, scaled afterwards.
Source   Zhai et al. 2023, arXiv:2303.06296 section 3.2 (gamma begins at 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from plait.config import ConfigError
from plait.model.layer import LayerSpec
from plait.precision.recipe import PrecisionRecipe
from plait.precision.weight_only import WeightOnlyLinear

# iterations for fresh weights, whose singular values lie close together
BEGIN = 20


class SigmaLinear(nn.Module):
    """A linear layer without bias, scaled to the spectral norm `gamma`, and a bias of its own."""

    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Module, d_in: int, d_out: int, *, bias: bool = False) -> None:
        """Wrap a layer; raises ConfigError for one that holds codes instead of a weight."""
        super().__init__()
        if isinstance(linear, WeightOnlyLinear):
            raise ConfigError('sigma_reparam=true needs weights, not codes; compute in "bf16" instead of int8 or int4')
        self.linear = linear
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.gamma = nn.Parameter(torch.empty(()))
        self.register_buffer("left", torch.empty(d_out))
        self.register_buffer("right", torch.empty(d_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out), in x.dtype."""
        y = self.linear(x) * (self.gamma / self.sigma())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def sigma(self) -> Tensor:
        """(), the spectral norm of the weight as the two vectors see it."""
        w = self._weight()
        return torch.dot(self.left.to(w.dtype), w @ self.right.to(w.dtype))

    @torch.no_grad()
    def advance(self) -> None:
        """One step of power iteration."""
        w = self._weight()
        left = nn.functional.normalize(w @ self.right.to(w.dtype), dim=0)
        self.left.copy_(left)
        self.right.copy_(nn.functional.normalize(w.mT @ left, dim=0))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """For a fresh weight: gamma 1, random vectors, and some steps at once."""
        self.gamma.fill_(1.0)
        self.right.copy_(torch.randn(self.right.shape, generator=generator))
        for _ in range(BEGIN):
            self.advance()

    def _weight(self) -> Tensor:
        w = self.linear.weight
        assert isinstance(w, Tensor)
        return w.to(torch.promote_types(w.dtype, torch.float32))


def linears(spec: LayerSpec, recipe: PrecisionRecipe) -> Callable[..., nn.Module]:
    """What makes the linear layers of a mixer: the recipe, reparametrised if the spec says so; same arguments."""
    if not spec.sigma_reparam:
        return recipe.linear

    def linear(d_in: int, d_out: int, *, bias: bool = False, **how: object) -> nn.Module:
        return SigmaLinear(recipe.linear(d_in, d_out, **how), d_in, d_out, bias=bias)  # type: ignore[arg-type]

    return linear


def advance(model: nn.Module) -> None:
    """Bring the norms of all reparametrised layers up to date with their weights; once before each training step."""
    for module in model.modules():
        if isinstance(module, SigmaLinear):
            module.advance()


def begin(mixer: nn.Module, generator: torch.Generator) -> None:
    """Fill what reparametrised layers have besides their fresh weights; draws nothing where there are none."""
    for module in mixer.modules():
        if isinstance(module, SigmaLinear):
            module.begin(generator)
