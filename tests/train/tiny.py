"""A tiny hybrid and a dataset of simple documents, for tests of training."""

import random
from pathlib import Path

from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.data.writer import ShardWriter
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.train.pretrain import NextToken

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "mamba2": {"n_heads": 4, "head_dim": 8, "d_state": 8, "n_groups": 2, "chunk": 8},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "mlp": {"d_ff": 64},
    "moe": {"n_experts": 4, "n_chosen": 2, "d_ff": 16, "d_shared": 16, "d_latent": 16},
}


def tiny_config(pattern: str = "M-*-") -> ModelConfig:
    """Some 20 thousand parameters."""
    used = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
    unused = {name for letter, name in used.items() if letter not in pattern}
    return ModelConfig.from_pattern(pattern, **{key: value for key, value in SIZES.items() if key not in unused})


def tiny_model(pattern: str = "M-*-", recipe: str = "fp32", seed: int = 0) -> Hybrid:
    """A fresh model of that config."""
    return build(tiny_config(pattern), recipe=recipe, seed=seed)


def write_documents(folder: Path, n: int = 300, seed: int = 0) -> Dataset:
    """Documents of 5 to 60 tokens in which each follows from the one before, but for some noise; 63 ends them."""
    rng = random.Random(seed)
    with ShardWriter(folder, VOCAB, eos_id=63) as writer:
        for _ in range(n):
            ids = [rng.randrange(62)]
            for _ in range(rng.randrange(4, 59)):
                ids.append((ids[-1] * 5 + 1) % 63 % 62 if rng.random() < 0.9 else rng.randrange(62))
            writer.add(ids)
    return Dataset.open(folder)


def objective(dataset: Dataset, *, accumulate: int = 1, rows: int = 4, length: int = 24, seed: int = 0) -> NextToken:
    """Next-token prediction over it; the same documents validate."""
    data = {"words": dataset}
    valid = Loader(data, batch_size=rows, seq_len=length, seed=1, repeat=False)
    loader = Loader(data, batch_size=rows, seq_len=length, seed=seed)
    return NextToken(
        loader, accumulate=accumulate, validation=valid, validation_batches=2, identity={"seed": seed, "rows": rows}
    )
