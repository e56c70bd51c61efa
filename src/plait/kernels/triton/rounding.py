"""Rounding to E4M3, E5M2 and E2M1 on GPUs, with whole-number operations on float32 bits; random numbers beside it.

    step = 2^(max(exponent of y, smallest) - M);      nearest: (y + shift) - shift,  shift = 1.5 * 2^23 step
    by chance: t = |y| / step, exact;  up where u < t - floor(t)

M is the element's mantissa bits, LOWEST the float32 bits of its smallest normal number. y is held to the largest
number first; NaN stays NaN. Every step is exact or rounded once, so the bits are the reference's on every device.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# element -> M, LOWEST, largest number
ELEMENTS = {"e4m3": (3, 121 << 23, 448.0), "e5m2": (2, 113 << 23, 57344.0), "e2m1": (1, 127 << 23, 6.0)}

_EXPONENT = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def magnitude_bits(x):
    """Bits without the sign: whole numbers in the order of the magnitudes, NaN above all."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _held(y, LARGEST: tl.constexpr):
    # comparisons, not minimum and maximum: a NaN must stay one
    y = tl.where(y > LARGEST, LARGEST, y)
    return tl.where(y < -LARGEST, -LARGEST, y)


@triton.jit
def _exponent(y, LOWEST: tl.constexpr):
    bits = y.to(tl.int32, bitcast=True) & _EXPONENT
    return tl.where(bits > LOWEST, bits, LOWEST)


@triton.jit
def nearest(y, M: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest number of the element, ties to even; the sign of a zero may be lost."""
    y = _held(y, LARGEST)
    shift = ((_exponent(y, LOWEST) + ((23 - M) << 23)) | 0x400000).to(tl.float32, bitcast=True)
    return (y + shift) - shift


@triton.jit
def by_chance(y, u, M: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """One of the two neighbours of y: the larger in magnitude with the chance of the distance from the other."""
    y = _held(y, LARGEST)
    step = _exponent(y, LOWEST) - (M << 23)
    t = magnitude_bits(y).to(tl.float32, bitcast=True) * ((254 << 23) - step).to(tl.float32, bitcast=True)
    below = tl.floor(t)
    number = tl.where(u < t - below, below + 1.0, below) * step.to(tl.float32, bitcast=True)
    number = tl.where(y < 0, -number, number)
    return tl.where(y == y, number, y)


@triton.jit
def code_of(number, M: tl.constexpr, LOWEST: tl.constexpr):
    """The code of a number of the element, without its sign."""
    exponent = _exponent(number, LOWEST)
    shift = exponent + ((23 - M) << 23)
    sum_ = magnitude_bits(number).to(tl.float32, bitcast=True) + shift.to(tl.float32, bitcast=True)
    return (sum_.to(tl.int32, bitcast=True) - shift) + ((exponent - LOWEST) >> (23 - M))


@triton.jit
def as_float(x, HALF: tl.constexpr):
    """What was loaded, bfloat16 if HALF, as float32: by bits, since the interpreter's cast loses subnormal numbers."""
    if HALF:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x
    return y


@triton.jit
def as_bfloat16(x):
    """x rounded to the nearest bfloat16, still float32: by bits for the same reason."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def uniform_rows(seed, row, columns, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Numbers in [0, 1) for a tile [ROWS, COLUMNS] at `row` (int64) of a matrix with C columns; see ops.random.

    columns: where the tile begins, a multiple of 4. EVEN: C is one too, so that four neighbours share a counter.
    """
    if EVEN:
        at = (row[:, None] * C + columns) // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    else:
        at = (row[:, None] * C + columns + tl.arange(0, COLUMNS)[None, :]) // 4
    low, high = at.to(tl.uint32), (at >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    if EVEN:
        word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, COLUMNS])
    else:
        lane = (row[:, None] * C + columns + tl.arange(0, COLUMNS)[None, :]) % 4
        word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    # 24 bits are exact in float32, and as a signed number
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
