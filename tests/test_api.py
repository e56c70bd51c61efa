"""The public names of the README exist and do what they say, from one import."""

import subprocess
import sys

import pytest
import torch

import plait

NAMES = ["load", "save", "build", "ModelConfig", "Engine", "Sampling", "ops", "quant"]
OPS = ["ssd", "selective_state_update", "causal_conv1d", "gated_rmsnorm", "rms_norm", "attention", "rotate", "route"]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_exists(name: str) -> None:
    assert getattr(plait, name) is not None


@pytest.mark.parametrize("name", OPS)
def test_an_operation_is_callable_from_the_top_and_documented(name: str) -> None:
    operation = getattr(plait.ops, name)
    assert callable(operation) and "Args:" in (operation.__doc__ or "")


def test_operations_stay_callable_after_their_files_are_imported() -> None:
    code = "import plait, plait.ops.ssd, plait.ops.attention; assert callable(plait.ops.ssd), plait.ops.ssd"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_and_machines_do_without_the_compiler_until_it_is_asked_for() -> None:
    # it takes two seconds and 150 MB
    code = """
import sys, torch, plait, plait.engine.engine, plait.train.loop
from plait.model.layers.mlp import MLP
config = plait.ModelConfig(d_model=32, vocab_size=64, layers=(MLP(d_ff=32),))
for recipe in ("bf16", "ternary"):
    plait.build(config, recipe)(torch.zeros(1, 4, dtype=torch.long))
heavy = {"torch._dynamo", "torch._inductor", "triton", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ternary_codes_and_back() -> None:
    codes, descale = plait.quant.ternary.quantize(torch.tensor([[0.9, -0.2], [-3.0, 0.1]]))
    assert codes.dtype == torch.int8 and codes.tolist() == [[1, 0], [-1, 0]]
    torch.testing.assert_close(plait.quant.ternary.dequantize(codes, descale)[0, 0], torch.tensor(1.05))


def test_a_model_from_a_preset_name() -> None:
    assert plait.ModelConfig.preset("nemotron-h-8b").pattern.startswith("M-M-M-M*-")
