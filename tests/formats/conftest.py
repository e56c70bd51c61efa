"""A tiny model with random weights, and a writer of safetensors files that may be wrong."""

import json
from pathlib import Path

import pytest
import torch

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build


@pytest.fixture
def tiny() -> Hybrid:
    """A bfloat16-free hybrid of every kind of layer, nothing at its default."""
    config = ModelConfig.from_pattern(
        "M-*E",
        vocab_size=50,
        d_model=16,
        mamba2={"n_heads": 4, "head_dim": 8, "d_state": 4, "n_groups": 2, "chunk": 8},
        attention={"n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
        mlp={"d_ff": 24},
        moe={"n_experts": 4, "n_chosen": 2, "d_ff": 8, "d_shared": 12},
        eos_ids=(2, 3),
        bos_id=1,
    )
    model = build(config, recipe="fp32", seed=3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape))
    return model


def write_raw(path: Path, header: object, data: bytes) -> Path:
    """A safetensors file with this header, right or wrong, and these bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.fixture
def raw():
    return write_raw
