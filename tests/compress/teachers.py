"""Teachers, text and masks that the tests of compression share."""

from pathlib import Path

import torch
from torch import Tensor

from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build

SIZES: dict[str, object] = {
    "vocab_size": 37,
    "d_model": 20,
    "init_std": 0.3,
    # so small that a mean over fewer channels shows, but eps does not
    "norm_eps": 1e-12,
    "mamba2": {"n_heads": 6, "head_dim": 4, "d_state": 5, "n_groups": 2, "chunk": 8},
    "attention": {"n_heads": 6, "n_kv_heads": 3, "head_dim": 6, "sub_norm": True},
    "mlp": {"d_ff": 24, "sub_norm": True, "gated": True},
    "moe": {"n_experts": 5, "n_chosen": 2, "d_ff": 7, "d_shared": 9},
}


def config(pattern: str = "M-*EM", **changed: object) -> ModelConfig:
    """A model of this pattern; sections are changed by name."""
    used = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
    unused = {name for letter, name in used.items() if letter not in pattern}
    merged = {**SIZES}
    for name, value in changed.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return ModelConfig.from_pattern(pattern, **{name: value for name, value in merged.items() if name not in unused})


def teacher(pattern: str = "M-*EM", seed: int = 1, **changed: object) -> Hybrid:
    """A fresh model of that config in float64, its norms and biases no longer trivial."""
    model = build(config(pattern, **changed), "fp32", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith(".D"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias") and "dt" not in name:
                p.normal_(0.0, 0.1, generator=generator)
    model.recipe = model.recipe.computing_in(torch.float64)
    for block in model.blocks:
        block.compute = torch.float64
    return model.double()


def batches(n: int = 4, rows: int = 2, length: int = 27, vocab: int = 37, seed: int = 3) -> list[Batch]:
    """Packed rows of random tokens; a document begins inside the first row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        ids = torch.randint(vocab, (rows, length), generator=generator)
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 0] = starts[0, 7] = True
        found.append(Batch(ids=ids, targets=ids.roll(-1, 1), starts=starts))
    return found


def checkpoint(model: Hybrid, folder: Path) -> Checkpoint:
    """The model as a checkpoint on disk."""
    return Checkpoint.open(save(model, folder / "teacher", "native"))


def logits(model: Hybrid, given: list[Batch]) -> Tensor:
    """(n, B, L, V) of all batches."""
    with torch.no_grad():
        return torch.stack([model(batch.ids, starts=batch.starts).logits for batch in given])


def student(pruned: Checkpoint) -> Hybrid:
    """The model of a pruned checkpoint, in float64."""
    return pruned.model(device="cpu", dtype="float64")
