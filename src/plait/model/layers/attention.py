"""Causal self-attention with grouped key/value heads.

    q, k, v = projections of x;  q, k, v = norms, rotation and temperature where the spec asks for them
    out = o_proj( sub_norm( attention(q, k, v) ) )

Nemotron-H uses no positions at all; Llama and Qwen rotate; Qwen2 has biases on q, k and v; Qwen3 normalises q and k
per head; BitNet normalises before the output projection. v_norm and the soft_ options keep training at high learning
rates from diverging, together with those that every layer has (LayerSpec).

Source   NVIDIA 2025, arXiv:2504.03624 section 2; the published configs of the other families; Rybakov et al. 2024,
         arXiv:2410.16682 (stability).
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

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
    require,
    sigma_params,
)
from plait.model.sigma import linears
from plait.ops.attention import attention
from plait.ops.decode_attention import decode_attention
from plait.ops.rope import Rope, inverse_frequencies, rotate
from plait.ops.soft_attention import extremes, soft_attention, soft_decode
from plait.ops.tape import Tape
from plait.precision.recipe import PrecisionRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(LayerSpec):
    """n_heads query heads of head_dim on n_kv_heads key/value heads; rope None means no positions.

    qk_norm, v_norm: norms per head. soft_temp: multiplies the logits. soft_cap: bounds them smoothly. soft_clip:
    (high, low) that the weights are stretched to before they are cut to 0 .. 1.
    """

    symbol: ClassVar[str] = "*"
    n_heads: int
    n_kv_heads: int
    head_dim: int = 128
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sub_norm: bool = False
    v_norm: bool = False
    soft_temp: float | None = None
    soft_cap: float | None = None
    soft_clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        positive = ("layer_scale", "soft_temp", "soft_cap")
        require(self, at_least_one=("n_heads", "n_kv_heads", "head_dim"), positive=positive)
        if self.soft_clip is not None and not self.soft_clip[1] <= 0 < 1 <= self.soft_clip[0]:
            raise ValueError(f"soft_clip={self.soft_clip}: must be (high, low) with high >= 1 and low <= 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads} of an attention layer"
            )
        if self.rope is not None:
            inverse_frequencies(self.rope, self.head_dim)

    @property
    def is_soft(self) -> bool:
        """Whether its logits must be seen one by one."""
        return self.soft_cap is not None or self.soft_clip is not None


@cache
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    # outside of inference mode, so that a training run may use what generation has put here
    with torch.inference_mode(False):
        frequencies, temperature = inverse_frequencies(rope, head_dim)
        return frequencies.to(device), temperature


class KVState:
    """Keys and values of all tokens so far, in buffers that grow by half when full, or at once by `reserve`."""

    def __init__(self, spec: Attention, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        empty = torch.empty(batch, spec.n_kv_heads, 0, spec.head_dim, device=device, dtype=dtype)
        self.k, self.v, self.length = empty, empty, 0  # (B, K, capacity, P)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, L, K, P) keys and values; returns all of them as (B, S, K, P) views."""
        end = self.length + k.shape[1]
        self.grow(end)
        self.k[:, :, self.length : end] = k.detach().transpose(1, 2)
        self.v[:, :, self.length : end] = v.detach().transpose(1, 2)
        self.length = end
        return self.k[:, :, :end].transpose(1, 2), self.v[:, :, :end].transpose(1, 2)

    def grow(self, end: int) -> None:
        """Make room for `end` tokens in all if there is too little, and for half as many again."""
        if end > self.k.shape[2]:
            self.reserve(max(end, self.k.shape[2] * 3 // 2, 64))

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many tokens in all, so that none of them is copied on the way there."""
        if n_tokens > self.k.shape[2]:
            # one after the other: at no time are both there twice
            self.k = self._grown(self.k, n_tokens)
            self.v = self._grown(self.v, n_tokens)

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def tensors(self) -> dict[str, Tensor]:
        """k and v (B, K, S, P), without the spare room."""
        return {"k": self.k[:, :, : self.length], "v": self.v[:, :, : self.length]}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Take other contents."""
        self.k, self.v = tensors["k"], tensors["v"]
        self.length = self.k.shape[2]


class FixedKV:
    """Keys and values in buffers of fixed size, one token per step, each sequence at its own length."""

    def __init__(self, empty: KVState, capacity: int) -> None:
        B, K, _, P = empty.k.shape
        self.k, self.v = empty.k.new_empty(B, K, capacity, P), empty.v.new_empty(B, K, capacity, P)

    def attend(self, s: Attention, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Write a token's (B, 1, K, P) key and value at its (B, 1) position; its (B, 1, H, P) query sees all so far."""
        at = positions[:, :, None, None].expand(-1, k.shape[2], -1, k.shape[3])
        self.k.scatter_(2, at, k.transpose(1, 2))
        self.v.scatter_(2, at, v.transpose(1, 2))
        if s.is_soft:
            return soft_decode(q, self.k, self.v, positions[:, 0] + 1, cap=s.soft_cap, clip=s.soft_clip)
        return decode_attention(q[:, 0], self.k, self.v, positions[:, 0] + 1)[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """k and v (B, K, capacity, P)."""
        return {"k": self.k, "v": self.v}

    def reserve(self, n_tokens: int) -> None:
        """Nothing to do: there is no more room than there is."""

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Take other buffers."""
        self.k, self.v = tensors["k"], tensors["v"]


class AttentionMixer(nn.Module):
    """The mixer; see the file's formula."""

    def __init__(self, spec: Attention, d_model: int, eps: float, recipe: PrecisionRecipe) -> None:
        super().__init__()
        self.spec = spec
        P = spec.head_dim
        wide, narrow = spec.n_heads * P, spec.n_kv_heads * P
        linear = linears(spec, recipe)
        self.q_proj = linear(d_model, wide, bias=spec.qkv_bias, role="attention.q_proj")
        self.k_proj = linear(d_model, narrow, bias=spec.qkv_bias, role="attention.k_proj")
        self.v_proj = linear(d_model, narrow, bias=spec.qkv_bias, role="attention.v_proj")
        self.q_norm = Norm(P, eps) if spec.qk_norm else None
        self.k_norm = Norm(P, eps) if spec.qk_norm else None
        self.v_norm = Norm(P, eps) if spec.v_norm else None
        self.sub_norm = Norm(wide, eps) if spec.sub_norm else None
        self.o_proj = linear(wide, d_model, bias=spec.out_bias, role="attention.o_proj")

    def forward(self, x: Tensor, span: Span, state: KVState | FixedKV | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); attends to and extends `state` when there is one."""
        s = self.spec
        q, k, v = self.heads(x, span)
        if isinstance(state, FixedKV):
            out = state.attend(s, q, k, v, span.positions)
        else:
            if state is not None:
                k, v = state.append(k, v)
            if s.is_soft:
                out = soft_attention(
                    q, k, v, cap=s.soft_cap, clip=s.soft_clip, key_mask=span.key_mask, documents=span.documents
                )
            else:
                out = attention(q, k, v, key_mask=span.key_mask, documents=span.documents, cuts=span.cuts)
        out = out.flatten(-2)
        return self.o_proj(out if self.sub_norm is None else self.sub_norm(out))

    def extremes(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """What the layer would see in x: largest logit and mean entropy of its weights, (H,) each."""
        q, k, _ = self.heads(x, span)
        return extremes(q, k, cap=self.spec.soft_cap, key_mask=span.key_mask, documents=span.documents)

    def heads(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) to the queries (B, L, H, P), keys and values (B, L, K, P) as attention takes them."""
        s = self.spec
        q = self.q_proj(x).unflatten(-1, (s.n_heads, s.head_dim))
        k = self.k_proj(x).unflatten(-1, (s.n_kv_heads, s.head_dim))
        v = self.v_proj(x).unflatten(-1, (s.n_kv_heads, s.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.v_norm is not None:
            v = self.v_norm(v)
        if s.rope is not None:
            frequencies, temperature = _frequencies(s.rope, s.head_dim, x.device)
            q = rotate(q, span.positions, frequencies, temperature=temperature)
            k = rotate(k, span.positions, frequencies, temperature=temperature)
        return q if s.soft_temp is None else q * s.soft_temp, k, v


def _init(mixer: AttentionMixer, std: float, n_layers: int, generator: torch.Generator) -> None:
    fill(mixer, std, generator, ("o_proj",), n_layers)


def _cost(s: Attention, d_model: int) -> Cost:
    wide, narrow = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    matrices = d_model * (2 * wide + 2 * narrow)
    biases = (wide + 2 * narrow if s.qkv_bias else 0) + (d_model if s.out_bias else 0)
    norms = s.head_dim * (2 * s.qk_norm + s.v_norm) + (wide if s.sub_norm else 0) + branch_params(s, d_model)
    sigma = sigma_params(s, (d_model, wide), (d_model, narrow), (d_model, narrow), (wide, d_model))
    params = matrices + biases + norms + sigma
    return Cost(
        params=params,
        active_params=params,
        flops_per_token=2 * matrices,
        flops_per_token_per_key=4 * wide,
        kv_numbers_per_token=2 * narrow,
    )


def _capture(mixer: AttentionMixer, tape: Tape, norm: Norm, state: KVState) -> None:
    s, rows = mixer.spec, tape.rows(tape.x, norm=norm)
    attended = tape.attend(
        tape.linear(mixer.q_proj, rows),
        tape.linear(mixer.k_proj, rows),
        tape.linear(mixer.v_proj, rows),
        state,
        heads=(s.n_heads, s.n_kv_heads, s.head_dim),
        norms=(mixer.q_norm, mixer.k_norm),
        rotation=None if s.rope is None else _frequencies(s.rope, s.head_dim, torch.device("cpu")),
    )
    tape.linear(mixer.o_proj, tape.normed(attended, mixer.sub_norm), onto=tape.x)


KIND = LayerKind(
    symbol="*",
    name="attention",
    spec=Attention,
    build=AttentionMixer,
    state=KVState,
    cost=_cost,
    init=_init,
    capture=_capture,
)
