"""What every kind of layer offers, and what a layer may know of the tokens it is given.

A layer file defines a spec (sizes), a mixer (the module), the state it keeps per sequence, and its cost; the table
`KINDS` in `model/layers/__init__.py` lists them. A mixer is called as `mixer(x, span, state)`: hidden states, the
span's facts (padding, documents, positions), and its own state, which it updates in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from plait.ops.norm import rms_norm

# what a layer may do besides the formula of its kind, by the name in its spec, and the value at which it does not
OFF: dict[str, object] = {
    "pre_norm": True,
    "post_norm": False,
    "layer_scale": None,
    "sigma_reparam": False,
    "v_norm": False,
    "soft_temp": None,
    "soft_cap": None,
    "soft_clip": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Sizes of one layer; each kind has its own subclass.

    For training at high rates, any kind may change its residual branch x + scale * post_norm(mixer(norm(x))):
    pre_norm: whether `norm` is there. post_norm: whether the mixer's output is normed. layer_scale: what a learned
    factor per channel begins with, None for no factor. sigma_reparam: see model/sigma.py.
    """

    symbol: ClassVar[str]
    pre_norm: bool = True
    post_norm: bool = False
    layer_scale: float | None = None
    sigma_reparam: bool = False

    def extras(self) -> dict[str, object]:
        """The options of OFF that are on; most formats and the fastest paths of decoding know none of them."""
        return {name: value for name, off in OFF.items() if (value := getattr(self, name, off)) != off}


def require(spec: object, *, at_least_one: tuple[str, ...] = (), positive: tuple[str, ...] = ()) -> None:
    """Refuse sizes that no layer can have.

    Raises: ValueError naming the field, its value and what is allowed.
    """
    for field in at_least_one:
        if getattr(spec, field) < 1:
            raise ValueError(f"{field}={getattr(spec, field)}: must be at least 1")
    for field in positive:
        if getattr(spec, field) is not None and not getattr(spec, field) > 0:
            raise ValueError(f"{field}={getattr(spec, field)}: must be more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The tokens of one forward call, B sequences of L, as the mixers must see them.

    positions: (B or 1, L) int64, counted from the start of each document.
    mask: (B, L) bool, False at padding; None when there is none.
    starts: (B, L) bool, True at the first token of a packed document; None when there is one per row.
    documents: (B, L) int64 index of each token's document, with `starts`.
    cuts: where documents begin among all tokens, as ops.attention wants it on a GPU; else None.
    key_mask: (B, S) bool over the cached tokens and these, False at padding; None when there is none.
    """

    positions: Tensor
    mask: Tensor | None = None
    starts: Tensor | None = None
    documents: Tensor | None = None
    key_mask: Tensor | None = None
    cuts: Tensor | None = None


class State(Protocol):
    """What a layer remembers of B sequences between calls."""

    def tensors(self) -> dict[str, Tensor]:
        """Its contents by name, batch first: for saving, selecting rows and counting bytes."""
        ...

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many tokens in all, if it grows with them."""
        ...

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Take other contents, with the names and layout of `tensors()`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a layer costs.

    params: stored numbers. active_params: those that one token is multiplied with.
    flops_per_token: multiply-adds counted twice, forward pass, without attention's products over the context.
    flops_per_token_per_key: attention's products with one cached token.
    kv_numbers_per_token: numbers the cache grows by per token.
    ssm_numbers, conv_numbers: numbers of constant-size state per sequence.
    """

    params: int
    active_params: int
    flops_per_token: int
    flops_per_token_per_key: int = 0
    kv_numbers_per_token: int = 0
    ssm_numbers: int = 0
    conv_numbers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """One row of the table of kinds.

    symbol: the pattern letter; name: for people; spec: its class.
    build: (spec, d_model, norm eps, recipe) to the mixer, with uninitialised weights.
    state: (spec, batch, device, dtype of activations) to an empty state, or None for a layer that remembers nothing.
    cost: (spec, d_model) to its cost, the layer's own input norm included.
    init: (mixer, standard deviation, number of layers, generator) fills fresh weights.
    capture: (mixer, tape, norm, state) writes x += mixer(norm(x)) of one token on a plait.ops.tape.Tape, None if it
        cannot be written.
    """

    symbol: str
    name: str
    spec: type[LayerSpec]
    build: Callable[..., nn.Module]
    state: Callable[..., State | None]
    cost: Callable[..., Cost]
    init: Callable[..., None]
    capture: Callable[..., None] | None = None


class Norm(nn.Module):
    """RMS norm with a learned scale, over the last dimension."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d), in x.dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


def branch_params(spec: LayerSpec, d_model: int) -> int:
    """Numbers of a block's norms and scale around its mixer."""
    return d_model * (spec.pre_norm + spec.post_norm + (spec.layer_scale is not None))


def sigma_params(spec: LayerSpec, *matrices: tuple[int, int]) -> int:
    """Numbers that reparametrised linear layers of these (inputs, outputs) hold besides their weights."""
    return sum(d_in + d_out + 1 for d_in, d_out in matrices) if spec.sigma_reparam else 0


def no_state(spec: LayerSpec, batch: int, device: torch.device, dtype: torch.dtype) -> None:
    """For kinds that remember nothing between tokens."""
    return None


def fill(module: nn.Module, std: float, generator: torch.Generator, scaled: tuple[str, ...], n_layers: int) -> None:
    """Fresh weights for the plain parts of a mixer: N(0, std) matrices, unit norms, zero biases.

    Args:
        module: the mixer; its own special parameters are filled by its kind afterwards.
        std: standard deviation of matrices.
        generator: source of randomness.
        scaled: names of output projections, drawn with std / sqrt(n_layers) so that the residual stream does not grow.
        n_layers: residual branches of the model.

    Source: Megatron-LM's scaled initialisation for hybrids (one branch per layer).
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif parameter.dim() >= 2:
            branch = name.startswith(scaled)
            parameter.normal_(0.0, std / n_layers**0.5 if branch else std, generator=generator)
