"""Configs of pure Mamba-2 models."""

import json
import math
from pathlib import Path

import pytest
import torch

from plait.formats.error import CheckpointError
from plait.formats.hf import read_config, write_config
from plait.model.config import ModelConfig
from plait.model.layers.mamba2 import Mamba2

SIZES: dict[str, object] = {
    "model_type": "mamba2",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "state_size": 12,
    "n_groups": 3,
}


def read(folder: Path, **fields: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(SIZES | fields))
    return read_config(folder)


def test_every_layer_is_mamba(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.layers == (Mamba2(n_heads=6, head_dim=8, d_state=12, n_groups=3, chunk=256),) * 2
    assert config.residual_in_fp32


@pytest.mark.parametrize("upper", (math.inf, {"__float__": "Infinity"}, "Infinity"))
def test_infinity_is_read_in_every_notation(upper: object, tmp_path: Path) -> None:
    (spec, _) = read(tmp_path, time_step_limit=[0.0, upper]).layers
    assert isinstance(spec, Mamba2) and spec.dt_limit == (0.0, math.inf)


def test_a_round_trip_is_the_identity(tmp_path: Path) -> None:
    config = read(tmp_path, use_bias=True, use_conv_bias=False, residual_in_fp32=False, time_step_limit=[0.1, 2.0])
    assert read(tmp_path, **write_config(config, torch.float32)) == config


def test_a_missing_number_of_heads_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_heads is missing"):
        read(tmp_path, num_heads=None)


def test_heads_that_are_no_multiple_of_the_width_go_elsewhere(tmp_path: Path) -> None:
    config = read(tmp_path, head_dim=10)
    # nemotron_h can say it: its widths follow from heads
    assert write_config(config, torch.float32)["model_type"] == "nemotron_h"
