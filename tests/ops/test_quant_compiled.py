"""Quantisers under torch.compile: one graph without breaks, the same bits, and no new graph for another length."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.ops.fp8 import dequantize_fp8, quantize_fp8
from plait.ops.hadamard import SIGNS
from plait.ops.mx import dequantize_mx, quantize_mx
from plait.ops.nvfp4 import dequantize_nvfp4, quantize_nvfp4

Quantise = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

CALLS: dict[str, Quantise] = {
    "fp8": lambda x, seed: quantize_fp8(x, "e5m2", seed=seed),
    "fp8 rows": lambda x, seed: quantize_fp8(x, block="row"),
    "fp8 tiles": lambda x, seed: quantize_fp8(x, block=(1, 128), power_of_two=True, seed=seed),
    "fp8 squares": lambda x, seed: quantize_fp8(x, block=(16, 128)),
    "mxfp8": lambda x, seed: quantize_mx(x),
    "mxfp4": lambda x, seed: quantize_mx(x, "e2m1", seed=seed),
    "nvfp4": lambda x, seed: quantize_nvfp4(x, seed=seed),
    "nvfp4 squares": lambda x, seed: quantize_nvfp4(x, block=(16, 16)),
    "nvfp4 rotated": lambda x, seed: quantize_nvfp4(x, hadamard=SIGNS, seed=seed, transposed=True),
    "and back, fp8": lambda x, seed: (dequantize_fp8(*quantize_fp8(x, block=(1, 128))),),
    "and back, mx": lambda x, seed: (dequantize_mx(*quantize_mx(x)),),
    "and back, nvfp4": lambda x, seed: (dequantize_nvfp4(*quantize_nvfp4(x)),),
}


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


# tracing takes a second each: three stand for all but in slow runs
QUICK = {"fp8 tiles", "mxfp4", "nvfp4 rotated"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS])
def test_one_graph_serves_every_length_and_seed(name: str) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(CALLS[name], backend=backend, fullgraph=True, dynamic=True)
    for step, rows in enumerate((32, 64, 48)):
        x, seed = torch.randn(rows, 384), torch.tensor(step)
        for ours, want in zip(compiled(x, seed), CALLS[name](x, seed), strict=True):
            assert torch.equal(_bits(ours), _bits(want))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_generated_code_has_the_same_bits(name: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=False)
    x = torch.randn(64, 384) * torch.logspace(-6, 6, 64)[:, None]
    x[3] = 0
    for ours, want in zip(compiled(x, torch.tensor(5)), CALLS[name](x, torch.tensor(5)), strict=True):
        assert torch.equal(_bits(ours), _bits(want))
