"""Mamba-2: a convolution, a selective state space and a gated norm between two projections.

    [z, x, B, C, dt] = in_proj(u)
    [x, B, C] = silu(conv([x, B, C]))
    y = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x
    out = out_proj( w * rmsnorm_groups(y * silu(z)) )

Source   Dao and Gu 2024, arXiv:2405.21060 section 7; NVIDIA 2025, arXiv:2504.03624 (Nemotron-H sizes).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.model.layer import Cost, LayerKind, LayerSpec, Norm, Span, branch_params, fill, require, sigma_params
from plait.model.sigma import linears
from plait.ops.conv import causal_conv1d, causal_conv1d_step, conv_window
from plait.ops.norm import gated_rmsnorm
from plait.ops.ssd import NO_LIMIT, selective_state_update, ssd
from plait.ops.tape import Tape
from plait.precision.recipe import PrecisionRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(LayerSpec):
    """n_heads heads of head_dim channels; B and C are shared by n_heads / n_groups heads each.

    dt_min, dt_max, dt_floor only shape fresh weights; dt_limit bounds the time step in every forward.
    """

    symbol: ClassVar[str] = "M"
    n_heads: int
    head_dim: int = 64
    d_state: int = 128
    n_groups: int = 8
    conv_width: int = 4
    chunk: int = 128
    conv_bias: bool = True
    proj_bias: bool = False
    dt_limit: tuple[float, float] = NO_LIMIT
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self) -> None:
        sizes = ("n_heads", "head_dim", "d_state", "n_groups", "conv_width", "chunk")
        require(self, at_least_one=sizes, positive=("dt_min", "dt_max", "dt_floor", "layer_scale"))
        low, high = self.dt_limit
        if not 0 <= low < high:
            raise ValueError(f"dt_limit={self.dt_limit}: must be two numbers, 0 or more, the second the larger")
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} exceeds dt_max={self.dt_max}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} does not divide n_heads={self.n_heads} of a Mamba-2 layer")

    @property
    def d_inner(self) -> int:
        """Channels between the projections: n_heads x head_dim, whatever the model's width."""
        return self.n_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Names and rows of what the input projection gives, in order."""
        shared = self.n_groups * self.d_state
        return ("z", self.d_inner), ("x", self.d_inner), ("B", shared), ("C", shared), ("dt", self.n_heads)

    @property
    def d_in_proj(self) -> int:
        """Rows of the input projection: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.n_heads


class Mamba2State:
    """The last conv_width inputs of the convolution and the state matrix of every head."""

    def __init__(self, spec: Mamba2, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.conv = torch.zeros(batch, spec.conv_dim, spec.conv_width, device=device, dtype=dtype)
        state_dtype = torch.promote_types(dtype, torch.float32)
        self.ssm = torch.zeros(batch, spec.n_heads, spec.head_dim, spec.d_state, device=device, dtype=state_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """conv (B, D, W) and ssm (B, H, P, N)."""
        return {"conv": self.conv, "ssm": self.ssm}

    def reserve(self, n_tokens: int) -> None:
        """Nothing to do: its size is the same after any number of tokens."""

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Take other contents."""
        self.conv, self.ssm = tensors["conv"], tensors["ssm"]


class Conv(nn.Module):
    """Weights of the depthwise convolution: (D, W) taps, oldest first, and a bias."""

    def __init__(self, d: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, width))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None


class Mamba2Mixer(nn.Module):
    """The mixer; see the file's formula."""

    def __init__(self, spec: Mamba2, d_model: int, eps: float, recipe: PrecisionRecipe) -> None:
        super().__init__()
        self.spec = spec
        linear = linears(spec, recipe)
        self.in_proj = linear(d_model, spec.d_in_proj, bias=spec.proj_bias, role="mamba2.in_proj", parts=spec.parts)
        self.conv = Conv(spec.conv_dim, spec.conv_width, spec.conv_bias)
        self.A_log = nn.Parameter(torch.empty(spec.n_heads))
        self.D = nn.Parameter(torch.empty(spec.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.norm = Norm(spec.d_inner, eps)
        self.out_proj = linear(spec.d_inner, d_model, bias=spec.proj_bias, role="mamba2.out_proj")

    def forward(self, u: Tensor, span: Span, state: Mamba2State | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); continues from and updates `state` when there is one."""
        s = self.spec
        z, xBC, dt = self.in_proj(u).split([s.d_inner, s.conv_dim, s.n_heads], dim=-1)
        if state is not None and u.shape[1] == 1 and span.mask is None and span.starts is None:
            y = self._step(xBC[:, 0], dt[:, 0], state)[:, None]
        else:
            y = self._scan(xBC, dt, span, state)
        y = gated_rmsnorm(y.flatten(-2), z, self.norm.weight, groups=s.n_groups, eps=self.norm.eps)
        return self.out_proj(y)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., conv_dim) to x (..., H, P), B and C (..., G, N)."""
        s = self.spec
        x, B, C = xBC.split([s.d_inner, s.n_groups * s.d_state, s.n_groups * s.d_state], dim=-1)
        return (
            x.unflatten(-1, (s.n_heads, s.head_dim)),
            B.unflatten(-1, (s.n_groups, s.d_state)),
            C.unflatten(-1, (s.n_groups, s.d_state)),
        )

    def _scan(self, xBC: Tensor, dt: Tensor, span: Span, state: Mamba2State | None) -> Tensor:
        if span.mask is not None:
            # a projection bias must not enter the convolution from padding
            xBC = xBC * span.mask[..., None]
        initial = None if state is None else state.conv
        active = causal_conv1d(xBC, self.conv.weight, self.conv.bias, initial=initial, starts=span.starts)
        x, B, C = self._split(active)
        y, last = ssd(
            x,
            dt,
            -self.A_log.float().exp(),
            B,
            C,
            D=self.D.float(),
            dt_bias=self.dt_bias.float(),
            dt_limit=self.spec.dt_limit,
            initial_state=None if state is None else state.ssm,
            starts=span.starts,
            mask=span.mask,
            chunk=self.spec.chunk,
        )
        if state is not None:
            # a cache remembers values, never the graph that made them
            state.conv = conv_window(xBC.detach(), self.spec.conv_width, initial=state.conv, mask=span.mask)
            state.ssm = last.detach()
        return y

    def _step(self, xBC: Tensor, dt: Tensor, state: Mamba2State) -> Tensor:
        x, B, C = self._split(causal_conv1d_step(xBC, state.conv, self.conv.weight, self.conv.bias))
        A = -self.A_log.float().exp()
        D, bias, limit = self.D.float(), self.dt_bias.float(), self.spec.dt_limit
        y = selective_state_update(state.ssm, x, dt, A, B, C, D=D, dt_bias=bias, dt_limit=limit)
        state.conv, state.ssm = state.conv.detach(), state.ssm.detach()
        return y


def _init(mixer: Mamba2Mixer, std: float, n_layers: int, generator: torch.Generator) -> None:
    """A uniform in 1 .. 16, time steps log-uniform in dt_min .. dt_max, D one, torch's convolution."""
    s = mixer.spec
    fill(mixer, std, generator, ("out_proj",), n_layers)
    bound = s.conv_width**-0.5
    mixer.conv.weight.uniform_(-bound, bound, generator=generator)
    if mixer.conv.bias is not None:
        mixer.conv.bias.uniform_(-bound, bound, generator=generator)
    mixer.A_log.uniform_(1.0, 16.0, generator=generator).log_()
    mixer.D.fill_(1.0)
    dt = torch.empty(s.n_heads).uniform_(math.log(s.dt_min), math.log(s.dt_max), generator=generator)
    dt = dt.exp().clamp(min=s.dt_floor)
    mixer.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # inverse of softplus


def _cost(s: Mamba2, d_model: int) -> Cost:
    biases = s.d_in_proj + d_model if s.proj_bias else 0
    matrices = d_model * (s.d_in_proj + s.d_inner)
    params = matrices + biases + s.conv_dim * (s.conv_width + s.conv_bias) + 3 * s.n_heads + s.d_inner
    params += branch_params(s, d_model) + sigma_params(s, (d_model, s.d_in_proj), (s.d_inner, d_model))
    state = s.d_inner * s.d_state
    return Cost(
        params=params,
        active_params=params,
        flops_per_token=2 * (matrices + s.conv_dim * s.conv_width) + 6 * state,
        ssm_numbers=state,
        conv_numbers=s.conv_dim * s.conv_width,
    )


def _capture(mixer: Mamba2Mixer, tape: Tape, norm: Norm, state: Mamba2State) -> None:
    s = mixer.spec
    projected = tape.linear(mixer.in_proj, tape.rows(tape.x, norm=norm))
    z, xBC, dt = projected.split([s.d_inner, s.conv_dim, s.n_heads], dim=-1)
    tape.conv_step(xBC, state, mixer.conv)
    y = tape.state_step(xBC, dt, state, mixer, groups=s.n_groups, dt_limit=s.dt_limit)
    gated = tape.normed(tape.rows(y, z, source="silu gate"), mixer.norm, s.n_groups)
    tape.linear(mixer.out_proj, gated, onto=tape.x)


KIND = LayerKind(
    symbol="M",
    name="Mamba-2",
    spec=Mamba2,
    build=Mamba2Mixer,
    state=Mamba2State,
    cost=_cost,
    init=_init,
    capture=_capture,
)
