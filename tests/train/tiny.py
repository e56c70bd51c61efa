"""A tiny hybrid and a stream of random documents, for tests of training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.train.pretrain import NextToken

TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "mamba2": {"n_heads": 4, "head_dim": 8, "d_state": 8, "n_groups": 2, "chunk": 8},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "mlp": {"d_ff": 64},
}


def tiny_model(pattern: str = "M-*-", recipe: str = "fp32", seed: int = 0) -> Hybrid:
    """Some 15 thousand parameters."""
    return build(ModelConfig.from_pattern(pattern, **TINY), recipe=recipe, seed=seed)


@dataclass(frozen=True)
class Rows:
    """A packed batch."""

    ids: Tensor
    targets: Tensor
    starts: Tensor | None


@dataclass(frozen=True)
class Stream:
    """Batch `step` of documents in which each token is the one before it times 5 plus 1, with some noise."""

    batch_size: int = 4
    length: int = 24
    seed: int = 0

    def batch(self, step: int) -> Rows:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        ids = torch.randint(0, 64, (self.batch_size, self.length + 1), generator=generator)
        noise = torch.rand(ids.shape, generator=generator) < 0.1
        for t in range(1, self.length + 1):
            ids[:, t] = torch.where(noise[:, t], ids[:, t], (ids[:, t - 1] * 5 + 1) % 64)
        starts = torch.rand((self.batch_size, self.length), generator=generator) < 0.1
        starts[:, 0] = True
        targets = ids[:, 1:].clone()
        # the last token of a document predicts nothing
        targets[:, :-1][starts[:, 1:]] = -100
        return Rows(ids[:, :-1].contiguous(), targets, starts)

    def identity(self) -> dict[str, object]:
        return {"seed": self.seed, "batch_size": self.batch_size, "length": self.length}


def objective(accumulate: int = 1, **kwargs: int) -> NextToken:
    """Next-token prediction over such a stream, validated on another seed."""
    return NextToken(Stream(**kwargs), accumulate=accumulate, validation=Stream(seed=9), validation_batches=2)
