"""Triton quantisers give the references' codes and scales bit for bit."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.kernels.quantised import FORMATS, FUSED, OTHER_SIGNS, cases_of_others, numbers, random_call, require_same

from plait.kernels.triton.tuning import DEFAULTS
from plait.ops.fp8 import Block, quantize_fp8
from plait.ops.hadamard import SIGNS, hadamard16
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import Scale, operand

# a block of zeros is divided by; what comes of it is replaced
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_random_matrices_in_every_format_give_the_codes_of_the_reference(n_shapes: int) -> None:
    rng = random.Random(3)
    for i in range(max(n_shapes, len(FORMATS))):
        require_same("triton", random_call(i, rng, (70, 200)))


def test_inputs_that_others_quantised_give_the_references_bits(
    shared: Path, monkeypatch: pytest.MonkeyPatch, n_shapes: int
) -> None:
    # one program for a whole input: the interpreter's time is the number of programs
    for kernel in ("quantise", "amax"):
        monkeypatch.setitem(DEFAULTS, kernel, DEFAULTS[kernel] | {"ROWS": 64, "COLUMNS": 256})
    cases = list(cases_of_others(shared))
    assert len(cases) > 200
    # all of them with --slow
    for name, compute in cases[:: 1 if n_shapes > 100 else 7]:
        try:
            require_same("triton", compute)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_the_references(dtype: torch.dtype) -> None:
    for shape in ((1, 16), (3, 7, 48), (300, 32)):
        x = numbers(*shape[-2:], dtype).expand(shape)
        for signs in (SIGNS, OTHER_SIGNS):
            require_same("triton", partial(hadamard16, x, signs))


def test_scales_of_subnormal_numbers_are_the_references() -> None:
    # amax / 448 from 2^-149 to 2^-120: subnormal shares that are rounded up, or not
    x = torch.exp2(torch.arange(-140, -111, 0.125))[:, None] * torch.linspace(0.1, 1.0, 32)
    for element in ("e4m3", "e5m2", "e2m1"):
        require_same("triton", partial(quantize_mx, x, element))
        require_same("triton", partial(quantize_mx, x.bfloat16(), element))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinities_and_nan_show_where_the_reference_shows_them(bad: float) -> None:
    x = numbers(128, 128, torch.float32)
    x[5, 7] = bad
    require_same("triton", partial(quantize_mx, x, "e4m3"))
    require_same("triton", partial(quantize_fp8, x, "e5m2", block=(1, 128)))
    require_same("triton", partial(quantize_fp8, x))
    require_same("triton", lambda: quantize_nvfp4(x)[1:])


@pytest.mark.parametrize(("element", "scale", "block"), FUSED)
def test_operands_are_the_references(element: str, scale: Scale, block: Block) -> None:
    tile = block if isinstance(block, tuple) else (1, 1)
    x = numbers(tile[0] * (128 // tile[0]), tile[1] * (160 // tile[1]), torch.float32)
    for seed in (None, 6):
        call = partial(operand, element=element, scale=scale, block=block, seed=seed)
        require_same("triton", partial(call, x))
        require_same("triton", partial(call, x.mT.contiguous(), transposed=True))
