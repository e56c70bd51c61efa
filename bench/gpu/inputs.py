"""Random inputs of one layer's operations, by the names of the operations' parameters."""

from collections.abc import Callable

import torch
from setting import Layer
from torch import Tensor

Tensors = dict[str, Tensor]
Random = Callable[..., Tensor]


def random(device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Random:
    """A function of sizes that gives normal numbers."""
    return lambda *sizes: (torch.randn(sizes, device=device) * scale).to(dtype)


def heads(s: Layer, device: torch.device) -> Tensors:
    """A, D and dt_bias of every head, float32."""
    return {
        "A": -torch.rand(s.heads, device=device) * 15 - 1,
        "D": torch.ones(s.heads, device=device),
        "dt_bias": torch.randn(s.heads, device=device) - 4,
    }


def scan(s: Layer, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """x, dt, B and C are parts of one convolution's result and one projection, as in the model."""
    xbc = random(device, dtype)(batch, length, s.conv)
    x, B, C = xbc.split([s.inner, s.groups * s.states, s.groups * s.states], -1)
    return {
        "x": x.unflatten(-1, (s.heads, s.head_dim)),
        "dt": random(device, dtype)(batch, length, s.heads),
        "B": B.unflatten(-1, (s.groups, s.states)),
        "C": C.unflatten(-1, (s.groups, s.states)),
        **heads(s, device),
    }


def update(s: Layer, batch: int, device: torch.device, dtype: torch.dtype, state: torch.dtype) -> Tensors:
    """One token of it."""
    one = {name: t[:, 0] if t.dim() > 1 else t for name, t in scan(s, batch, 1, device, dtype).items()}
    return {"state": torch.randn(batch, s.heads, s.head_dim, s.states, device=device).to(state), **one}


def window(s: Layer, batch: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """One token of the convolution."""
    make = random(device, dtype)
    return {"x": make(batch, s.conv), "window": make(batch, s.conv, 4), "w": make(s.conv, 4), "bias": make(s.conv)}


def cache(s: Layer, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """A query on a full cache."""
    make = random(device, dtype)
    shape = (batch, s.keys, length, s.attention_dim)
    lengths = torch.full((batch,), length, device=device, dtype=torch.int64)
    return {
        "q": make(batch, s.queries, s.attention_dim),
        "k_cache": make(*shape),
        "v_cache": make(*shape),
        "lengths": lengths,
    }
