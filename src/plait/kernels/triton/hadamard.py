"""The rotation of 16 neighbours on GPUs: butterflies in the reference's order, so that the bits are the same."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.rounding import as_bfloat16, as_float
from plait.kernels.triton.tuning import DEFAULTS, config

# groups of 16 that a program rotates
DEFAULTS["hadamard16"] = {"GROUPS": 256, "num_warps": 4}


def signs_mask(signs: tuple[int, ...]) -> int:
    """The signs as bits, 1 where negative."""
    return sum(1 << i for i, sign in enumerate(signs) if sign < 0)


@triton.jit
def _exchange(x, APART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pairs = tl.reshape(x, [ROWS * COLUMNS // (2 * APART), 2, APART])
    a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, COLUMNS])


@triton.jit
def rotated(x, SIGNS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each 16 of a row of the tile [ROWS, COLUMNS], float32, rounded to bfloat16 if HALF."""
    negative = (tl.full([COLUMNS], SIGNS, tl.int32) >> (tl.arange(0, COLUMNS) % 16)) & 1
    x = tl.where(negative[None, :] == 1, -x, x)
    x = _exchange(x, 1, ROWS, COLUMNS)
    x = _exchange(x, 2, ROWS, COLUMNS)
    x = _exchange(x, 4, ROWS, COLUMNS)
    x = _exchange(x, 8, ROWS, COLUMNS) * 0.25
    if HALF:
        x = as_bfloat16(x)
    return x


@triton.jit
def _rotate(x_ptr, y_ptr, n, SIGNS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = as_float(tl.load(x_ptr + at, mask=at < n, other=0.0), HALF)
    tl.store(y_ptr + at, rotated(x, SIGNS, HALF, GROUPS, 16).to(y_ptr.dtype.element_ty), mask=at < n)


def hadamard16(x: Tensor, signs: tuple[int, ...]) -> Tensor:
    """See plait.ops.hadamard; x float32 or bfloat16."""
    x = x.contiguous()
    y, c = torch.empty_like(x), config("hadamard16")
    grid = (triton.cdiv(x.numel(), 16 * c["GROUPS"]),)
    _rotate[grid](x, y, x.numel(), SIGNS=signs_mask(signs), HALF=x.dtype == torch.bfloat16, **c)
    return y
