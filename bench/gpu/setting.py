"""Sizes of everything that is measured on a GPU: those of the 8B hybrid, and tiny ones for trying the script."""

from dataclasses import dataclass

import torch

from plait.model.config import ModelConfig

# FLOP/s of dense bfloat16 products and bytes/s of memory, by the datasheets
DATASHEETS = {"H200": (989.4e12, 4.8e12), "H100": (989.4e12, 3.35e12), "A100": (312e12, 2.039e12)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer of a hybrid: H heads of P, G groups, N states, chunk Q, width D, query and key/value heads."""

    heads: int = 128
    head_dim: int = 64
    groups: int = 8
    states: int = 128
    chunk: int = 128
    width: int = 4096
    queries: int = 32
    keys: int = 8
    attention_dim: int = 128
    vocabulary: int = 131072

    @property
    def inner(self) -> int:
        """I = H P."""
        return self.heads * self.head_dim

    @property
    def conv(self) -> int:
        """Channels of the convolution."""
        return self.inner + 2 * self.groups * self.states


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured. scans: (batch, length). Lengths are in tokens; most: sequences at once, 0 for all that fit."""

    layer: Layer
    scans: tuple[tuple[int, int], ...]
    updates: tuple[int, ...]
    context: int
    loss_tokens: int
    step_context: int
    train_pattern: str
    train_shape: tuple[int, int]
    prompt: int
    answer: int
    piece: int
    most: int
    copied: int
    square: int
    seconds: float
    rounds: int
    models: dict[str, ModelConfig]
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"


MODELS = ("nemotron-h-8b", "llama-3.1-8b", "qwen2.5-7b")


def full() -> Setting:
    """The real thing."""
    return Setting(
        layer=Layer(),
        scans=((1, 8192), (8, 8192), (1, 65536)),
        updates=(1, 8, 32, 64, 128, 256),
        context=65536,
        loss_tokens=8192,
        step_context=8192,
        train_pattern="M-M-M*-M-M-",
        train_shape=(2, 8192),
        prompt=65536,
        answer=1024,
        piece=8192,
        most=0,
        copied=2 << 30,
        square=8192,
        seconds=0.3,
        rounds=30,
        models={name: ModelConfig.preset(name) for name in MODELS},
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
    )


def tiny(least: bool) -> Setting:
    """The same on the CPU in seconds; `least` of them."""
    layer = Layer(
        heads=2,
        head_dim=16,
        groups=1,
        states=16,
        chunk=16,
        width=32,
        queries=4,
        keys=2,
        attention_dim=16,
        vocabulary=96,
    )
    sections = {
        "mamba2": {"n_heads": 2, "head_dim": 16, "d_state": 16, "n_groups": 1, "chunk": 16},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
        "mlp": {"d_ff": 64},
    }

    def model(name: str, pattern: str) -> ModelConfig:
        return ModelConfig.from_pattern(pattern, vocab_size=96, d_model=32, name=name, **sections)

    shapes = ("M-M*-", "*-*-*-", "*-*-")
    return Setting(
        layer=layer,
        scans=((1, 32),) if least else ((1, 64), (2, 40), (1, 130)),
        updates=(1,) if least else (1, 3),
        context=300 if least else 1000,
        loss_tokens=24,
        step_context=40,
        train_pattern="M-*-",
        train_shape=(2, 32),
        prompt=64 if least else 200,
        answer=8,
        piece=32,
        most=3,
        copied=1 << 20,
        square=128,
        seconds=0.0,
        rounds=1,
        models={name: model(name, pattern) for name, pattern in zip(MODELS, shapes, strict=True)},
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
