"""The operations over many tokens, as training and reading a prompt call them, at the sizes of a model.

FLOPs   of the state space's recurrence 6 per state and token (its chunks need more, in matrix products); of attention
        those over visible keys; of linear layers and the head 2 per weight and token. Backward is twice forward.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from plait.cli.benches.case import Call, Case, case_of
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.ops.activation import squared_relu
from plait.ops.attention import attention
from plait.ops.conv import causal_conv1d
from plait.ops.loss import linear_cross_entropy
from plait.ops.norm import gated_rmsnorm, rms_norm
from plait.ops.ssd import ssd

# the head costs more than everything else together: fewer tokens, and of a large vocabulary a part
LOSS_SHARE, MOST_ROWS = 4, 32768


def many(config: ModelConfig, tokens: int, device: str = "cpu") -> Iterator[Case]:
    """Cases of one model, forward alone and with backward."""
    by_kind = {type(spec): spec for spec in config.layers}
    make = Maker(config, device)
    for gradients in (False, True):
        end = ", fwd + bwd" if gradients else ""
        yield case_of(f"rms norm{end}", rms_norm, make.norm, tokens, gradients=gradients)
        mamba, mlp, attends = (by_kind.get(kind) for kind in (Mamba2, MLP, Attention))
        if isinstance(mamba, Mamba2):
            make.mamba = mamba
            yield case_of(f"convolution + SiLU{end}", causal_conv1d, make.conv, tokens, gradients=gradients)
            flops = 6.0 * tokens * mamba.d_inner * mamba.d_state
            # the reference goes token by token: too slow to wait for
            yield case_of(f"ssd{end}", ssd, make.ssd, tokens, flops=flops, gradients=gradients, slow="chunked")
            yield case_of(f"gated norm{end}", gated_rmsnorm, make.gated, tokens, gradients=gradients)
        if isinstance(mlp, MLP):
            make.mlp = mlp
            yield case_of(f"squared ReLU{end}", squared_relu, make.hidden, tokens, gradients=gradients)
        if isinstance(attends, Attention):
            make.attends = attends
            flops = 4.0 * attends.n_heads * attends.head_dim * tokens * (tokens + 1) / 2
            name = f"attention, causal{end}"
            yield case_of(name, attention, make.qkv, tokens, flops=flops, gradients=gradients)
    few = max(tokens // LOSS_SHARE, 1)
    rows = min(config.vocab_size, MOST_ROWS)
    flops = 2.0 * few * rows * config.d_model
    name = f"head of {rows} + cross-entropy, {few} tokens, fwd + bwd"
    yield case_of(name, linear_cross_entropy, make.head, few, flops=flops, gradients=True)


class Maker:
    """Arguments of the operations, with the numbers that a model gives them."""

    mamba: Mamba2
    mlp: MLP
    attends: Attention

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.config, self.device = config, device
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def norm(self, L: int) -> Call:
        D = self.config.d_model
        return (self.random(1, L, D), self.random(D, dtype=torch.float32)), {}

    def conv(self, L: int) -> Call:
        D, W = self.mamba.conv_dim, self.mamba.conv_width
        w, bias = self.random(D, W, dtype=torch.float32), self.random(D, dtype=torch.float32)
        return (self.random(1, L, D), w / W, bias), {}

    def ssd(self, L: int) -> Call:
        s = self.mamba
        x, dt = self.random(1, L, s.n_heads, s.head_dim), self.random(1, L, s.n_heads)
        B, C = (self.random(1, L, s.n_groups, s.d_state) for _ in range(2))
        A = -torch.linspace(1.0, 16.0, s.n_heads, device=self.device)
        # fresh models step by 1e-3 .. 0.1: softplus of about -4.6
        bias = torch.full((s.n_heads,), -4.6, device=self.device)
        D = torch.ones(s.n_heads, device=self.device)
        return (x, dt, A, B, C), {"D": D, "dt_bias": bias, "chunk": s.chunk}

    def gated(self, L: int) -> Call:
        D = self.mamba.d_inner
        return (self.random(1, L, D), self.random(1, L, D), self.random(D, dtype=torch.float32)), {
            "groups": self.mamba.n_groups
        }

    def hidden(self, L: int) -> Call:
        return (self.random(1, L, self.mlp.d_ff),), {}

    def qkv(self, L: int) -> Call:
        a = self.attends
        heads = (a.n_heads, a.n_kv_heads, a.n_kv_heads)
        return tuple(self.random(1, L, n, a.head_dim) for n in heads), {}

    def head(self, L: int) -> Call:
        V, D = min(self.config.vocab_size, MOST_ROWS), self.config.d_model
        targets = torch.randint(0, V, (L,), generator=self.generator).to(self.device)
        return (self.random(L, D), self.random(V, D, dtype=torch.float32) * 0.02, targets), {}
