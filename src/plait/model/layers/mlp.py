"""Feed-forward layers: squared ReLU (Nemotron-H), SwiGLU (Llama, Qwen), gated squared ReLU with a sub-norm (BitNet).

    ungated   out = down( relu(up x)^2 )
    gated     out = down( sub_norm( act(gate x) * up x ) )

Source   NVIDIA 2025, arXiv:2504.03624 section 2; Ma et al. 2025, arXiv:2504.12285 section 2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.model.layer import (
    Cost,
    LayerKind,
    LayerSpec,
    Norm,
    Span,
    branch_params,
    fill,
    no_state,
    require,
    sigma_params,
)
from plait.model.sigma import linears
from plait.ops.activation import gate, squared_relu
from plait.ops.tape import Tape
from plait.precision.recipe import PrecisionRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP(LayerSpec):
    """d_ff hidden channels; gated layers have a second input projection; only "relu2" exists ungated."""

    symbol: ClassVar[str] = "-"
    d_ff: int
    activation: Literal["relu2", "silu"] = "relu2"
    gated: bool = False
    bias: bool = False
    sub_norm: bool = False

    def __post_init__(self) -> None:
        require(self, at_least_one=("d_ff",), positive=("layer_scale",))
        if self.activation == "silu" and not self.gated:
            raise ValueError("activation='silu' of an MLP layer needs gated=true (SwiGLU); ungated layers use 'relu2'")


class MLPMixer(nn.Module):
    """The mixer; see the file's formula."""

    def __init__(self, spec: MLP, d_model: int, eps: float, recipe: PrecisionRecipe) -> None:
        super().__init__()
        self.spec = spec
        linear = linears(spec, recipe)
        self.up_proj = linear(d_model, spec.d_ff, bias=spec.bias, role="mlp.up_proj")
        self.gate_proj = linear(d_model, spec.d_ff, bias=spec.bias, role="mlp.gate_proj") if spec.gated else None
        self.sub_norm = Norm(spec.d_ff, eps) if spec.sub_norm else None
        self.down_proj = linear(spec.d_ff, d_model, bias=spec.bias, role="mlp.down_proj")

    def forward(self, x: Tensor, span: Span | None = None, state: None = None) -> Tensor:
        """(B, L, D) to (B, L, D), token by token."""
        if self.gate_proj is None:
            h = squared_relu(self.up_proj(x))
        else:
            h = gate(self.gate_proj(x), self.up_proj(x), activation=self.spec.activation)
        return self.down_proj(h if self.sub_norm is None else self.sub_norm(h))


def _init(mixer: MLPMixer, std: float, n_layers: int, generator: torch.Generator) -> None:
    fill(mixer, std, generator, ("down_proj",), n_layers)


def _cost(s: MLP, d_model: int) -> Cost:
    matrices = (3 if s.gated else 2) * d_model * s.d_ff
    biases = (1 + s.gated) * s.d_ff + d_model if s.bias else 0
    shapes = [(d_model, s.d_ff)] * (1 + s.gated) + [(s.d_ff, d_model)]
    norms = (s.d_ff if s.sub_norm else 0) + branch_params(s, d_model)
    params = matrices + biases + norms + sigma_params(s, *shapes)
    return Cost(params=params, active_params=params, flops_per_token=2 * matrices)


def _capture(mixer: MLPMixer, tape: Tape, norm: Norm, state: None) -> None:
    rows = tape.rows(tape.x, norm=norm)
    up = tape.linear(mixer.up_proj, rows)
    if mixer.gate_proj is None:
        h = tape.rows(up, source="relu2", norm=mixer.sub_norm)
    else:
        gated = tape.linear(mixer.gate_proj, rows)
        h = tape.rows(up, gated, source=f"{mixer.spec.activation} gate", norm=mixer.sub_norm)
    tape.linear(mixer.down_proj, h, onto=tape.x)


KIND = LayerKind(
    symbol="-", name="MLP", spec=MLP, build=MLPMixer, state=no_state, cost=_cost, init=_init, capture=_capture
)
