"""Native quantisers give the references' codes, scales and operands bit for bit, in every build."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.fp8 import quantize_fp8
from plait.ops.hadamard import SIGNS
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import BLOCKS, ELEMENTS, operand, operand_of

pytestmark = pytest.mark.usefixtures("target")

OTHER_SIGNS = tuple(1 if i * i % 7 < 3 else -1 for i in range(16))
FORMATS = [(e, s, b) for e, scales in ELEMENTS.items() for s in scales for b in BLOCKS[s]]


def numbers(rows: int, columns: int, dtype: torch.dtype, kind: str = "outliers") -> Tensor:
    """A matrix whose blocks differ in size, with zeros, minus zeros and whole blocks of zeros."""
    x = torch.randn(rows, columns)
    if kind == "outliers":
        x *= torch.exp(3 * torch.randn(rows, 1)) * torch.exp(torch.randn(columns))
    elif kind == "ties":
        x = (x * 8).round() / 4
    elif kind == "decades":
        x *= 10.0 ** torch.randint(-36, 30, (rows, 1))
    elif kind == "subnormal":
        x *= 1e-39
    x.view(-1)[torch.randperm(x.numel())[: x.numel() // 9]] = 0
    x.view(-1)[torch.randperm(x.numel())[: x.numel() // 17]] = -0.0
    x[: rows // 3, : columns // 2] = 0
    return x.to(dtype)


KINDS = ("normal", "outliers", "ties", "decades", "subnormal")


def require_same(compute: Callable[[], object]) -> None:
    """The same tensors, bit for bit, from the native kernels and from the reference; NaN equals NaN."""
    with use("native"):
        ours = compute()
    with use("reference"):
        theirs = compute()
    pairs = (
        zip(ours, theirs, strict=True) if isinstance(ours, tuple) and isinstance(theirs, tuple) else [(ours, theirs)]
    )
    for a, b in pairs:
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        assert a.shape == b.shape and a.dtype == b.dtype
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        equal = a.contiguous().view(bits) == b.contiguous().view(bits)
        if a.is_floating_point() and bits != torch.uint8:
            # subnormal bfloat16 numbers are zeros to the processors' own instructions
            tiny = (a.abs().float() < 2.0**-126) & (b.abs().float() < 2.0**-126) & (a.dtype == torch.bfloat16)
            equal |= (a == b) | (a.isnan() & b.isnan()) | tiny
        elif a.is_floating_point():
            equal |= a.float().isnan() & b.float().isnan()
        assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ"


def sides(block: object, rng: random.Random) -> tuple[int, int]:
    """Odd sizes where blocks allow them."""
    rows, columns = block if isinstance(block, tuple) else (1, 1)
    return rows * rng.randint(1, max(1, 100 // rows)), columns * rng.randint(1, max(2, 200 // columns))


def test_random_matrices_in_every_format_give_the_codes_and_operands_of_the_reference(n_shapes: int) -> None:
    rng = random.Random(1)
    for i in range(4 * n_shapes):
        element, scale, block = FORMATS[i % len(FORMATS)]
        rows, columns = sides(block, rng)
        dtype, kind = rng.choice((torch.float32, torch.bfloat16)), rng.choice(KINDS)
        seed, transposed = rng.choice((None, rng.getrandbits(63))), rng.random() < 0.5
        if transposed:
            # numbers drawn down columns come four at a time
            columns = columns + -columns % 4 if seed is not None else columns
            x = numbers(columns, rows, dtype, kind).mT if rng.random() < 0.5 else numbers(rows, columns, dtype, kind)
        else:
            x = numbers(rows, columns, dtype, kind)
        if scale == "e4m3":
            signs = rng.choice((None, SIGNS, OTHER_SIGNS))
            turned = transposed and x.is_contiguous() and rows % 16 == 0
            if not turned or block == (16, 16):
                require_same(lambda: quantize_nvfp4(x, block=block, hadamard=signs, seed=seed))  # noqa: B023
            if turned:
                how = {"block": block, "hadamard": signs, "seed": seed, "transposed": True}
                require_same(lambda: quantize_nvfp4(x, **how))  # noqa: B023
        elif scale == "e8m0":
            require_same(lambda: quantize_mx(x, element, seed=seed))  # noqa: B023
        else:
            require_same(lambda: quantize_fp8(x, element, block=block, power_of_two=scale == "pow2", seed=seed))  # noqa: B023
        if block != "row" and (scale != "float32" or block is None):
            require_same(lambda: operand(x, element=element, scale=scale, block=block, seed=seed))  # noqa: B023


@pytest.mark.parametrize("seed", [None, 3, 2**62 + 12345])
@pytest.mark.parametrize("signs", [None, SIGNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_operands_count_along_the_rows_they_are_summed_over(
    seed: int | None, signs: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    for rows, columns in ((16, 1), (48, 37), (272, 131)):
        x = numbers(rows, columns, dtype)
        how = {"hadamard": signs, "seed": seed, "transposed": True}
        require_same(lambda: quantize_nvfp4(x, **how))  # noqa: B023
        require_same(lambda: operand(x, element="e2m1", scale="e4m3", block=(1, 16), **how))  # noqa: B023


@pytest.mark.parametrize(("element", "scale", "block"), FORMATS)
def test_an_operand_times_descale_is_what_its_codes_stand_for(element: str, scale: str, block: object) -> None:
    x = numbers(256, 256, torch.float32)
    a, descale = operand(x, element=element, scale=scale, block=block)  # type: ignore[arg-type]
    error = ((a.float() * descale - x).norm() / x.norm()).item()
    assert error < (0.2 if element == "e2m1" else 0.09)
    # bfloat16 adds no error of its own: the float32 codes times scales are the operand
    if scale == "e4m3":
        codes, scales, _ = quantize_nvfp4(x, block=block)  # type: ignore[arg-type]
        require_same(lambda: operand_of(codes, scales))
    elif scale == "e8m0":
        codes, scales = quantize_mx(x, element)  # type: ignore[arg-type]
        require_same(lambda: operand_of(codes, scales))
    elif scale == "pow2" and isinstance(block, tuple):
        codes, scales = quantize_fp8(x, element, block=block, power_of_two=True)  # type: ignore[arg-type]
        require_same(lambda: operand_of(codes, scales))
    elif not isinstance(block, tuple):
        codes, _ = quantize_fp8(x, element, block=block)  # type: ignore[arg-type]
        require_same(lambda: operand_of(codes))
    assert torch.equal(operand_of(codes, scales) if scale in ("e8m0", "e4m3") else a, a)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_every_code_opens_to_its_number(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    require_same(lambda: operand_of(codes[:-3]))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_show_where_the_reference_shows_them(bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = numbers(128, 256, dtype)
        x[5, 7] = bad
        for element, scale, block in FORMATS:
            if block != "row" and (scale != "float32" or block is None):
                require_same(lambda: operand(x, element=element, scale=scale, block=block))  # noqa: B023
        require_same(lambda: quantize_mx(x, "e4m3"))  # noqa: B023
        require_same(lambda: quantize_fp8(x, "e5m2", block=(1, 128)))  # noqa: B023


def test_matrices_that_blocks_do_not_divide_are_left_to_the_reference_which_refuses_them() -> None:
    x = torch.randn(48, 40)
    for compute in (lambda: quantize_nvfp4(x), lambda: quantize_mx(x), lambda: quantize_fp8(x, block=(128, 128))):
        with pytest.raises(ValueError, match="does not divide"):
            compute()
    with pytest.raises(ValueError, match="is no format"):
        operand(x, element="e2m1", scale="float32")


def test_two_threads_give_the_bits_of_one() -> None:
    x = numbers(384, 160, torch.bfloat16)
    compute = lambda: operand(x, element="e2m1", scale="e4m3", block=(1, 16), seed=4, hadamard=SIGNS, transposed=True)  # noqa: E731
    one = compute()[0]
    torch.set_num_threads(2)
    try:
        assert torch.equal(compute()[0], one)
    finally:
        torch.set_num_threads(1)
