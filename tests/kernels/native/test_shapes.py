"""Kernels do not look at shapes: calls whose tensors do not agree are refused before one is reached."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.kernels.native import library
from plait.ops.attention import attention
from plait.ops.conv import causal_conv1d, causal_conv1d_step
from plait.ops.dispatch import BackendError, use
from plait.ops.linear import linear
from plait.ops.norm import gated_rmsnorm, rms_norm
from plait.ops.quant import quantize_groups, weight_only_linear
from plait.ops.ssd import selective_state_update, ssd

pytestmark = pytest.mark.skipif(library.library("decode") is None, reason="the native kernels are not compiled")

# operation, tensors that agree, and the number and shape of one that does not
Case = tuple[Callable[..., object], dict[str, Tensor], list[tuple[str, tuple[int, ...]]]]
SCAN = {"x": (2, 5, 4, 8), "dt": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 16), "C": (2, 5, 2, 16), "D": (4,)}
STEP = {"state": (2, 4, 8, 16), "x": (2, 4, 8), "dt": (2, 4), "A": (4,), "B": (2, 2, 16), "C": (2, 2, 16)}
CODES = dict(zip(("codes", "scales", "zeros"), quantize_groups(torch.ones(6, 128), 8, 64, True), strict=True))


def of(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.ones(size) for name, size in sizes.items()}


CASES: list[Case] = [
    (linear, of({"x": (2, 64), "w": (5, 64), "bias": (5,)}), [("x", (2, 100)), ("x", (2, 60)), ("bias", (4,))]),
    (rms_norm, of({"x": (3, 32), "w": (32,)}), [("w", (1,)), ("w", (31,))]),
    (
        lambda **t: gated_rmsnorm(**t, groups=2),
        of({"x": (2, 3, 32), "z": (2, 3, 32), "w": (32,)}),
        [("z", (1, 1, 32)), ("w", (1,))],
    ),
    (
        causal_conv1d,
        of({"x": (2, 5, 8), "w": (8, 4), "bias": (8,), "initial": (2, 8, 4), "starts": (2, 5)}),
        [("w", (7, 4)), ("bias", (1,)), ("initial", (1, 8, 4)), ("starts", (1, 5))],
    ),
    (
        causal_conv1d_step,
        of({"x": (2, 8), "window": (2, 8, 4), "w": (8, 4), "bias": (8,)}),
        [("x", (1, 8)), ("w", (7, 4)), ("bias", (1,))],
    ),
    (
        attention,
        of({"q": (2, 1, 4, 8), "k": (2, 1, 1, 8), "v": (2, 1, 1, 8)})
        | {"key_mask": torch.ones(2, 1, dtype=torch.bool)},
        [("q", (3, 1, 4, 8)), ("q", (2, 1, 4, 9)), ("v", (1, 1, 1, 8)), ("key_mask", (1, 1))],
    ),
    (ssd, of(SCAN), [("dt", (2, 5, 1)), ("A", (1,)), ("C", (2, 5, 1, 16)), ("B", (1, 5, 2, 16)), ("D", (1,))]),
    (ssd, of(SCAN) | of({"initial_state": (2, 4, 8, 16)}), [("initial_state", (1, 4, 8, 16))]),
    (selective_state_update, of(STEP), [("state", (1, 4, 8, 16)), ("dt", (1, 4)), ("C", (2, 2, 8)), ("A", (1,))]),
    (
        lambda **t: weight_only_linear(**t, bits=8, group=64),
        of({"x": (2, 128)}) | CODES,
        [("x", (2, 192)), ("scales", (6, 1)), ("zeros", (5, 2))],
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_tensors_that_do_not_agree_are_refused(case: int) -> None:
    op, tensors, wrong = CASES[case]
    with torch.no_grad(), use("native"):
        op(**{name: t.clone() for name, t in tensors.items()})
        for name, shape in wrong:
            given = tensors | {name: torch.ones(shape).to(tensors[name])}
            with pytest.raises((BackendError, ValueError)):
                op(**given)
