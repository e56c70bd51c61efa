"""Quantisation on processors: the codes and scales of the references, bit for bit, or bfloat16 operands at once.

A matrix is named by its memory, (R, C) row-major; `flipped` asks for its transpose's codes. Blocks are in memory order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from plait.kernels.native.library import call

ELEMENTS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}
# how a block's scale is made; "given": one number for the tensor, each row or each column, made before
SCALES = {"given": 0, "float32": 1, "pow2": 2, "e8m0": 3, "e4m3": 4}
CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.uint8}
SCALE_DTYPES = {"float32": torch.float32, "pow2": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


# sides of blocks that tiles are multiples of
SIDES = (1, 16, 32, 64, 128)


class Matrix(NamedTuple):
    """x: contiguous, float32 or bfloat16, taken as (-1, its last dimension); flipped: its transpose is meant."""

    x: Tensor
    flipped: bool

    @property
    def meant(self) -> Tensor:
        """What is quantised."""
        return self.x.mT if self.flipped else self.x

    @property
    def sizes(self) -> tuple[int, int]:
        """R and C, of the memory."""
        return self.x.numel() // self.x.shape[-1], self.x.shape[-1]


def matrix(x: Tensor, transposed: bool = False) -> Matrix:
    """x, or its transpose, with a transpose of contiguous memory understood as such."""
    if not x.is_contiguous() and x.dim() == 2 and x.mT.is_contiguous():
        return Matrix(x.mT, not transposed)
    return Matrix(x.contiguous(), transposed)


def fits(
    x: Tensor, block: tuple[int, int] | None, *, transposed: bool = False, rotated: bool = False, random: bool = False
) -> bool:
    """Whether the kernels take x; else the reference does, or says what is wrong."""
    if not x.numel() or (transposed and x.dim() != 2):
        return False
    shape = x.mT.shape if transposed else x.shape
    if block is not None:
        if not set(block) <= set(SIDES) or len(shape) < 1 + (block[0] > 1) or shape[-1] % block[1]:
            return False
        if block[0] > 1 and shape[-2] % block[0]:
            return False
    # as `matrix` will see it, without its copy
    flipped = transposed != (not x.is_contiguous() and x.dim() == 2 and x.mT.is_contiguous())
    return shape[-1] % (16 if rotated else 4 if flipped and random else 1) == 0


def amax(m: Matrix, signs: tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude () float32, of the numbers rotated along each row of what is meant if signs are given."""
    out = torch.empty((), dtype=torch.float32)
    call("quantise", "amax", m.x, m.x.dtype == torch.bfloat16, *m.sizes, _floats(signs), m.flipped, out)
    return out


def codes(
    m: Matrix,
    element: str,
    scale: str,
    block: tuple[int, int] | None = None,
    *,
    given: Tensor | None = None,
    signs: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and the scales of blocks (nothing without blocks), in the shapes of the references.

    Args:
        m: the matrix; element: of ELEMENTS; scale: of SCALES.
        block: (rows, columns) that share a scale, of what is meant; None with "given".
        given: float32, what numbers are multiplied by: (), or (rows, 1); for "e4m3" the tensor's scale.
        signs: 16 of a rotation along rows of what is meant. seed: round at random.
    """
    shape = m.meant.shape
    columns = shape[-1] // 2 if element == "e2m1" else shape[-1]
    out = torch.empty((*shape[:-1], columns), dtype=CODES[element])
    rows, columns = block or (1, shape[-1])
    above = (shape[-2] // rows,) if len(shape) > 1 else ()
    scales = torch.empty((*shape[:-2], *above, shape[-1] // columns), dtype=SCALE_DTYPES.get(scale, torch.float32))
    _quantise(m, element, scale, block, given, signs, seed, out, scales if block else None)
    return out, scales


def operand(
    m: Matrix,
    element: str,
    scale: str,
    block: tuple[int, int] | None = None,
    *,
    given: Tensor | None = None,
    signs: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """bfloat16 codes times their blocks' scales, as of `codes`; of a flipped matrix a view of memory in m's order."""
    out = torch.empty(m.x.shape, dtype=torch.bfloat16)
    _quantise(m, element, scale, block, given, signs, seed, out, None)
    return out.mT if m.flipped else out


def _quantise(
    m: Matrix,
    element: str,
    scale: str,
    block: tuple[int, int] | None,
    given: Tensor | None,
    signs: tuple[int, ...] | None,
    seed: int | Tensor | None,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    rows, columns = block or ((1, 16) if m.flipped else (1, 1))
    if m.flipped:
        rows, columns = columns, rows
    per = 0 if given is None or given.numel() == 1 else 2 if m.flipped else 1
    how = (m.flipped, rows, columns, SCALES[scale], given, per, seed is not None, 0 if seed is None else int(seed))
    half, fake = m.x.dtype == torch.bfloat16, out.dtype == torch.bfloat16
    call("quantise", "quantise", ELEMENTS[element], m.x, half, *m.sizes, _floats(signs), *how, fake, out, scales)


def _floats(signs: tuple[int, ...] | None) -> Tensor | None:
    return None if signs is None else torch.tensor(signs, dtype=torch.float32)


def decode(codes: Tensor, scales: Tensor | None) -> Tensor:
    """The bfloat16 operand that contiguous codes stand for, times their blocks' scales; see plait.ops.operand."""
    element = next(name for name, dtype in CODES.items() if dtype == codes.dtype)
    C = codes.shape[-1] * (2 if element == "e2m1" else 1)
    out = torch.empty((*codes.shape[:-1], C), dtype=torch.bfloat16)
    R = out.numel() // C
    rows, columns, scale = 1, C, "given"
    if scales is not None:
        rows, columns = R // scales.shape[0], C // scales.shape[1]
        scale = next(name for name, dtype in SCALE_DTYPES.items() if dtype == scales.dtype)
    call("quantise", "decode", ELEMENTS[element], codes, R, C, rows, columns, SCALES[scale], scales, out)
    return out
