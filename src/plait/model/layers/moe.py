"""Mixture of experts of the Nemotron 3 models: a sigmoid router, small experts, one shared expert, a latent width.

    w, chosen = route(x);  r = latent_in(x) or x
    out = latent_out( sum_j w_j expert_j(r) ) + shared(x)          every expert: down( relu(up r)^2 )

The router and the shared expert read the full width; the correction bias is not trained by gradient.

Source   NVIDIA 2025, arXiv:2512.20848 (Nemotron 3 Nano).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model.layer import Cost, LayerKind, LayerSpec, Span, branch_params, fill, no_state, require
from plait.model.layers.mlp import MLP, MLPMixer
from plait.ops.moe import experts, route
from plait.precision.recipe import PrecisionRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE(LayerSpec):
    """n_chosen of n_experts experts of d_ff per token, chosen inside the best n_top_groups of n_groups groups.

    d_shared: hidden size of the shared expert, 0 for none. d_latent: width the experts work in, None for d_model.
    """

    symbol: ClassVar[str] = "E"
    n_experts: int
    n_chosen: int
    d_ff: int
    d_shared: int = 0
    d_latent: int | None = None
    n_groups: int = 1
    n_top_groups: int = 1
    normalises: bool = True
    scale: float = 1.0
    bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("n_experts", "n_chosen", "d_ff", "n_groups", "n_top_groups")
        require(self, at_least_one=sizes, positive=("scale", "layer_scale"))
        if self.sigma_reparam:
            raise ValueError("sigma_reparam=true of an experts layer: stacked experts have no such form; leave it out")
        if self.d_shared < 0 or (self.d_latent is not None and self.d_latent < 1):
            raise ValueError(
                f"d_shared={self.d_shared}, d_latent={self.d_latent}: widths must be positive, or left out"
            )
        if self.n_experts % self.n_groups or self.n_top_groups > self.n_groups:
            raise ValueError(
                f"expert groups: n_groups={self.n_groups} must divide n_experts={self.n_experts} "
                f"and n_top_groups={self.n_top_groups} must not exceed it"
            )
        reachable = self.n_experts // self.n_groups * self.n_top_groups
        if self.n_chosen > reachable:
            raise ValueError(f"n_chosen={self.n_chosen} exceeds the {reachable} experts that a token may choose from")


class Router(nn.Module):
    """Scores of all experts; the correction is a buffer: it comes with a checkpoint, no gradient moves it."""

    correction: Tensor

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.register_buffer("correction", torch.empty(n_experts, dtype=torch.float32))


class Experts(nn.Module):
    """All experts' weights, stacked: up (E, F, X), down (E, X, F)."""

    def __init__(self, n_experts: int, d_in: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(n_experts, d_ff, d_in))
        self.down = nn.Parameter(torch.empty(n_experts, d_in, d_ff))


class MoEMixer(nn.Module):
    """The mixer; see the file's formula."""

    def __init__(self, spec: MoE, d_model: int, eps: float, recipe: PrecisionRecipe) -> None:
        super().__init__()
        self.spec, Z = spec, spec.d_latent
        self.router = Router(d_model, spec.n_experts)
        self.experts = Experts(spec.n_experts, Z or d_model, spec.d_ff)
        self.shared = MLPMixer(MLP(d_ff=spec.d_shared, bias=spec.bias), d_model, eps, recipe) if spec.d_shared else None
        self.latent_in = recipe.linear(d_model, Z, bias=spec.bias, role="moe.latent_in") if Z else None
        self.latent_out = recipe.linear(Z, d_model, bias=spec.bias, role="moe.latent_out") if Z else None

    def forward(self, x: Tensor, span: Span | None = None, state: None = None) -> Tensor:
        """(B, L, D) to (B, L, D), token by token."""
        s, flat = self.spec, x.flatten(0, 1)
        weights, chosen = route(
            F.linear(flat.float(), self.router.weight.float()),
            self.router.correction,
            n_chosen=s.n_chosen,
            n_groups=s.n_groups,
            n_top_groups=s.n_top_groups,
            normalises=s.normalises,
            scale=s.scale,
        )
        r = flat if self.latent_in is None else self.latent_in(flat)
        y = experts(r, weights, chosen, self.experts.up, self.experts.down)
        if self.latent_out is not None:
            y = self.latent_out(y)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)


def _init(mixer: MoEMixer, std: float, n_layers: int, generator: torch.Generator) -> None:
    fill(mixer, std, generator, ("experts.down", "shared.down_proj", "latent_out"), n_layers)
    mixer.router.correction.zero_()


def _cost(s: MoE, d_model: int) -> Cost:
    width = s.d_latent or d_model
    expert = 2 * s.d_ff * width
    always = s.n_experts * d_model + 2 * d_model * s.d_shared + (2 * d_model * s.d_latent if s.d_latent else 0)
    biases = 0
    if s.bias:
        biases = (s.d_shared + d_model if s.d_shared else 0) + (s.d_latent + d_model if s.d_latent else 0)
    rest = always + biases + s.n_experts + branch_params(s, d_model)
    active = s.n_chosen * expert
    return Cost(params=s.n_experts * expert + rest, active_params=active + rest, flops_per_token=2 * (active + always))


KIND = LayerKind(symbol="E", name="experts", spec=MoE, build=MoEMixer, state=no_state, cost=_cost, init=_init)
