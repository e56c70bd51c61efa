"""A small Mamba-2 model that has learned to recall: which value a key had when it was seen before."""

import torch

from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build

KEYS, VALUES, STEPS = 8, 9, 250


def pairs(seed: int, rows: int = 16, length: int = 24) -> Batch:
    """Rows of key, value, key, value; values of keys that were seen before are to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(KEYS, (rows, length), generator=generator)
    table = torch.randint(KEYS, KEYS + VALUES, (rows, KEYS), generator=generator)
    values = table.gather(1, keys)
    again = (keys[:, :, None] == keys[:, None]).tril(-1).any(-1)
    ids = torch.stack([keys, values], -1).flatten(1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, ::2] = torch.where(again, values, IGNORED)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(ids=ids, targets=targets, starts=starts)


def trained(seed: int, groups: int) -> Hybrid:
    """The model after some steps; a quarter of a minute."""
    sizes = {"n_heads": 12, "head_dim": 8, "d_state": 16, "n_groups": groups, "chunk": 16}
    config = ModelConfig.from_pattern("MM", vocab_size=KEYS + VALUES, d_model=48, init_std=0.08, mamba2=sizes)
    model = build(config, "fp32", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS) + 1e-5
        batch = pairs(100_000 * seed + step)
        x, _ = model.hidden(batch.ids, starts=batch.starts)
        loss = model.loss_sum(x, batch.targets) / (batch.targets != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
