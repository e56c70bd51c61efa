"""Quantisers on GPUs: a tile is read once, rotated, scaled block by block, rounded, and written as codes and scales.

A matrix is named by strides, so that its transpose costs no copy: blocks, the rotation and the count of random numbers
follow what is meant. NVFP4 and FP8 with one scale for the tensor need its largest magnitude first: a pass of its own.

Bytes    what is read (twice with a tensor-wide scale) and the codes; scales are 1/16 to 1/128 of the numbers.
Numbers  whole-number operations on float32 bits and divisions rounded once: the reference's bits on every device.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.hadamard import rotated, signs_mask
from plait.kernels.triton.rounding import ELEMENTS, as_float, by_chance, code_of, magnitude_bits, nearest, uniform_rows
from plait.kernels.triton.tuning import DEFAULTS, config

# least rows and columns of a tile; blocks may make it larger
DEFAULTS["quantise"] = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4}
DEFAULTS["amax"] = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}

# how a block's scale is made; GIVEN was made before
GIVEN, FLOAT, POWER, E8M0, TWO_LEVELS = (tl.constexpr(i) for i in range(5))
SCALES = {"given": 0, "float32": 1, "pow2": 2, "e8m0": 3, "e4m3": 4}
CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.uint8}
SCALE_DTYPES = {"float32": torch.float32, "pow2": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}

_INFINITE = tl.constexpr(0x7F800000)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_HALF_MAX = tl.constexpr(3.3895313892515355e38)
_E4M3 = tl.constexpr(121 << 23)


@triton.jit
def _scale_of(bits, given, LARGEST: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr):
    """What numbers are multiplied by, what a code is worth, and the scale's code, for blocks' largest magnitudes."""
    amax = bits.to(tl.float32, bitcast=True)
    nan = float("nan")
    one = tl.full(bits.shape, 1.0, tl.float32)
    if SCALE == TWO_LEVELS:
        target = amax * (given * 0.16666666666666666)
        worth = nearest(tl.where(target > 448.0, 448.0, target), 3, _E4M3, 448.0)
        times = tl.div_rn(one, worth * tl.div_rn(one, one * given))
        times = tl.where(times > _FLOAT_MAX, _FLOAT_MAX, times)
        code = tl.where(worth == worth, code_of(worth, 3, _E4M3), 127)
    elif SCALE == E8M0:
        share = tl.div_rn(amax, one * LARGEST).to(tl.int32, bitcast=True)
        # a subnormal share is at most 2^-127 up to half of its bits
        more = (share & 0x7FFFFF) > tl.where((share >> 23) == 0, 0x400000, 0)
        code = (share >> 23) + more.to(tl.int32)
        worth = tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)
        times = tl.where(code == 0, one, ((254 << 23) - (code << 23)).to(tl.float32, bitcast=True))
        bad = bits >= _INFINITE
        worth, times, code = tl.where(bad, nan, worth), tl.where(bad, nan, times), tl.where(bad, 255, code)
    else:
        times = tl.div_rn(one * LARGEST, amax)
        times = tl.where(times > (_HALF_MAX if HALF else _FLOAT_MAX), _HALF_MAX if HALF else _FLOAT_MAX, times)
        times = tl.where(bits == 0, 1.0, times)
        if SCALE == POWER:
            times = (times.to(tl.int32, bitcast=True) & _INFINITE).to(tl.float32, bitcast=True)
        times = tl.where(bits >= _INFINITE, nan, times)
        worth = tl.div_rn(one, times)
        code = bits
    return times, worth, code


@triton.jit
def _spread(b, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # [ROWS / BLOCK_R, COLUMNS / BLOCK_C] to [ROWS, COLUMNS]
    wide = tl.broadcast_to(b[:, None, :, None], [ROWS // BLOCK_R, BLOCK_R, COLUMNS // BLOCK_C, BLOCK_C])
    return tl.reshape(wide, [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["seed"])
def _quantise(
    x_ptr,
    x_row,
    x_column,
    R,
    C,
    given_ptr,
    given_row,
    seed,
    out_ptr,
    scales_ptr,
    M: tl.constexpr,
    LOWEST: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALF: tl.constexpr,
    SIGNS: tl.constexpr,
    RANDOM: tl.constexpr,
    EVEN: tl.constexpr,
    FAKE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    here = (row < R)[:, None] & (column < C)[None, :]
    x = as_float(tl.load(x_ptr + row[:, None] * x_row + column[None, :] * x_column, mask=here, other=0.0), HALF)
    if SIGNS >= 0:
        x = rotated(x, SIGNS, HALF, ROWS, COLUMNS)
    if SCALE == GIVEN:
        scale = tl.load(given_ptr + row * given_row, mask=row < R, other=1.0)
        times = tl.broadcast_to(scale[:, None], [ROWS, COLUMNS])
        worth = tl.full([ROWS, COLUMNS], 1.0, tl.float32)
    else:
        bits = tl.max(tl.reshape(magnitude_bits(x), [ROWS, COLUMNS // BLOCK_C, BLOCK_C]), axis=2)
        if BLOCK_R > 1:
            bits = tl.max(tl.reshape(bits, [ROWS // BLOCK_R, BLOCK_R, COLUMNS // BLOCK_C]), axis=1)
        given = tl.load(given_ptr) if SCALE == TWO_LEVELS else 1.0
        times, worth, code = _scale_of(bits, given, LARGEST, SCALE, HALF)
        if not FAKE:
            down = tl.program_id(0).to(tl.int64) * (ROWS // BLOCK_R) + tl.arange(0, ROWS // BLOCK_R)
            right = first // BLOCK_C + tl.arange(0, COLUMNS // BLOCK_C)
            inside = (down < R // BLOCK_R)[:, None] & (right < C // BLOCK_C)[None, :]
            scales = worth if SCALE == FLOAT or SCALE == POWER else code.to(tl.uint8)
            tl.store(scales_ptr + down[:, None] * (C // BLOCK_C) + right[None, :], scales, mask=inside)
        times = _spread(times, BLOCK_R, BLOCK_C, ROWS, COLUMNS)
        worth = _spread(worth, BLOCK_R, BLOCK_C, ROWS, COLUMNS)
    y = x * times
    if RANDOM:
        number = by_chance(y, uniform_rows(seed, row, first, C, ROWS, COLUMNS, EVEN), M, LOWEST, LARGEST)
    else:
        number = nearest(y, M, LOWEST, LARGEST)
    if FAKE:
        # exact, so that no rounding matters
        tl.store(out_ptr + row[:, None] * C + column[None, :], (number * worth).to(tl.bfloat16), mask=here)
    else:
        code = tl.where(number == number, code_of(number, M, LOWEST), 0 if M == 1 else 127)
        sign = (y.to(tl.int32, bitcast=True) >> 31) & 1
        if SCALE == TWO_LEVELS:
            sign = tl.where(y == 0, 0, sign)
        if M == 1:
            low, high = tl.split(tl.reshape(code | sign << 3, [ROWS, COLUMNS // 2, 2]))
            pair = first // 2 + tl.arange(0, COLUMNS // 2)
            inside = (row < R)[:, None] & (pair < C // 2)[None, :]
            tl.store(out_ptr + row[:, None] * (C // 2) + pair[None, :], (low | high << 4).to(tl.uint8), mask=inside)
        else:
            tl.store(out_ptr + row[:, None] * C + column[None, :], (code | sign << 7).to(tl.uint8), mask=here)


@triton.jit
def _amax(
    x_ptr,
    x_row,
    x_column,
    R,
    C,
    out_ptr,
    HALF: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < R)[:, None] & (column < C)[None, :]
    x = as_float(tl.load(x_ptr + row[:, None] * x_row + column[None, :] * x_column, mask=here, other=0.0), HALF)
    if SIGNS >= 0:
        x = rotated(x, SIGNS, HALF, ROWS, COLUMNS)
    tl.atomic_max(out_ptr, tl.max(tl.max(magnitude_bits(x), axis=1), axis=0))


def matrix(x: Tensor) -> Tensor:
    """(..., C) as (R, C), without a copy where its strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def amax(x: Tensor, signs: tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude () float32 of x (..., C), after the rotation of its rows if signs are given."""
    x = matrix(x)
    bits, c = torch.zeros((), dtype=torch.int32, device=x.device), config("amax")
    R, C = x.shape
    grid = (triton.cdiv(R, c["ROWS"]), triton.cdiv(C, c["COLUMNS"]))
    _amax[grid](x, *x.stride(), R, C, bits, HALF=x.dtype == torch.bfloat16, SIGNS=_mask(signs), **c)
    return bits.view(torch.float32)


def codes(
    x: Tensor,
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
        x: (..., R, C) float32 or bfloat16; a transposed view is read where it lies.
        element: of ELEMENTS; scale: of SCALES; block: (rows, columns) that share one, which divides x.
        given: float32, what numbers are multiplied by: (), or (..., R, 1); for "e4m3" the tensor's scale.
        signs: 16 of a rotation along rows. seed: round at random.
    """
    shape = x.shape
    columns = shape[-1] // 2 if element == "e2m1" else shape[-1]
    out = torch.empty((*shape[:-1], columns), dtype=torch.uint8, device=x.device)
    rows, columns = block or (1, shape[-1])
    above = (shape[-2] // rows,) if len(shape) > 1 else ()
    dtype = SCALE_DTYPES.get(scale, torch.float32)
    scales = torch.empty((*shape[:-2], *above, shape[-1] // columns), dtype=dtype, device=x.device)
    raw = scales.view(torch.uint8) if dtype == torch.float8_e4m3fn else scales
    _launch(x, element, scale, block, given, signs, seed, out, raw)
    return out.view(CODES[element]), scales


def operand(
    x: Tensor,
    element: str,
    scale: str,
    block: tuple[int, int] | None = None,
    *,
    given: Tensor | None = None,
    signs: tuple[int, ...] | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """bfloat16 codes times their blocks' scales, as of `codes`."""
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    _launch(x, element, scale, block, given, signs, seed, out, out)
    return out


def _launch(
    x: Tensor,
    element: str,
    scale: str,
    block: tuple[int, int] | None,
    given: Tensor | None,
    signs: tuple[int, ...] | None,
    seed: int | Tensor | None,
    out: Tensor,
    scales: Tensor,
) -> None:
    x = matrix(x)
    (R, C), (rows, columns) = x.shape, block or (1, 1)
    c = config("quantise")
    tile = {"ROWS": max(c["ROWS"], rows), "COLUMNS": max(c["COLUMNS"], columns)}
    # a tile of 128 x 128 numbers needs the registers of more threads
    warps = c["num_warps"] * max(1, tile["ROWS"] * tile["COLUMNS"] // (4 * c["ROWS"] * c["COLUMNS"]))
    M, LOWEST, LARGEST = ELEMENTS[element]
    per_row = 0 if given is None or given.numel() == 1 else 1
    grid = (triton.cdiv(R, tile["ROWS"]), triton.cdiv(C, tile["COLUMNS"]))
    _quantise[grid](
        *(x, *x.stride(), R, C, scales if given is None else given.contiguous(), per_row),
        *(0 if seed is None else int(seed), out, scales),
        **{"M": M, "LOWEST": LOWEST, "LARGEST": LARGEST, "SCALE": SCALES[scale], "BLOCK_R": rows, "BLOCK_C": columns},
        **{"HALF": x.dtype == torch.bfloat16, "SIGNS": _mask(signs), "RANDOM": seed is not None, "EVEN": C % 4 == 0},
        **{"FAKE": out.dtype == torch.bfloat16, **tile, "num_warps": min(16, warps)},
    )


def _mask(signs: tuple[int, ...] | None) -> int:
    return -1 if signs is None else signs_mask(signs)
