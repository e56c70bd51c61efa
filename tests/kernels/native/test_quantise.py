"""Native quantisers give the references' codes, scales and operands bit for bit, in every build."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.kernels.quantised import FORMATS, FUSED, KINDS, cases_of_others, numbers, random_call, require_same

from plait.ops.fp8 import Block, quantize_fp8
from plait.ops.hadamard import SIGNS
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import Scale, operand, operand_of

pytestmark = pytest.mark.usefixtures("target")


def test_random_matrices_in_every_format_give_the_codes_of_the_reference(n_shapes: int) -> None:
    rng = random.Random(1)
    for i in range(4 * n_shapes):
        require_same("native", random_call(i, rng, (300, 300)))


@pytest.mark.parametrize(("element", "scale", "block"), FUSED)
def test_operands_of_random_matrices_are_the_references(
    element: str, scale: Scale, block: Block, n_shapes: int
) -> None:
    rng = random.Random(2)
    for _ in range(max(2, n_shapes // 5)):
        tile = block if isinstance(block, tuple) else (1, 1)
        rows, columns = (side * rng.randint(1, max(1, 150 // side)) for side in tile)
        seed = rng.choice((None, rng.getrandbits(63)))
        columns += -columns % 4
        x = numbers(rows, columns, rng.choice((torch.float32, torch.bfloat16)), rng.choice(KINDS))
        call = partial(operand, element=element, scale=scale, block=block, seed=seed)
        require_same("native", partial(call, x))
        require_same("native", partial(call, x.mT.contiguous(), transposed=True))
        require_same("native", partial(call, x.mT.contiguous().mT))


@pytest.mark.parametrize("seed", [None, 3, 2**62 + 12345])
@pytest.mark.parametrize("signs", [None, SIGNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_operands_count_along_the_rows_they_are_summed_over(
    seed: int | None, signs: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    for rows, columns in ((16, 1), (48, 37), (272, 131)):
        x = numbers(rows, columns, dtype)
        how = {"hadamard": signs, "seed": seed, "transposed": True}
        require_same("native", lambda: quantize_nvfp4(x, **how))  # noqa: B023
        require_same("native", lambda: operand(x, element="e2m1", scale="e4m3", block=(1, 16), **how))  # noqa: B023


@pytest.mark.parametrize(("element", "scale", "block"), FORMATS)
def test_an_operand_times_descale_is_what_its_codes_stand_for(element: str, scale: str, block: object) -> None:
    x = numbers(256, 256, torch.float32)
    a, descale = operand(x, element=element, scale=scale, block=block)  # type: ignore[arg-type]
    error = ((a.float() * descale - x).norm() / x.norm()).item()
    assert error < (0.2 if element == "e2m1" else 0.09)
    # bfloat16 adds no error of its own: the float32 codes times scales are the operand
    if scale == "e4m3":
        codes, scales, _ = quantize_nvfp4(x, block=block)  # type: ignore[arg-type]
        require_same("native", lambda: operand_of(codes, scales))
    elif scale == "e8m0":
        codes, scales = quantize_mx(x, element)  # type: ignore[arg-type]
        require_same("native", lambda: operand_of(codes, scales))
    elif scale == "pow2" and isinstance(block, tuple):
        codes, scales = quantize_fp8(x, element, block=block, power_of_two=True)  # type: ignore[arg-type]
        require_same("native", lambda: operand_of(codes, scales))
    elif not isinstance(block, tuple):
        codes, _ = quantize_fp8(x, element, block=block)  # type: ignore[arg-type]
        require_same("native", lambda: operand_of(codes))


def test_inputs_that_others_quantised_give_the_references_bits(shared: Path) -> None:
    tried = 0
    for name, compute in cases_of_others(shared):
        try:
            require_same("native", compute)
        except AssertionError as error:
            raise AssertionError(name) from error
        tried += 1
    assert tried > 100


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_every_code_opens_to_its_number(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    require_same("native", lambda: operand_of(codes[:-3]))


def test_rotations_of_subnormal_numbers_keep_them() -> None:
    x = numbers(32, 48, torch.bfloat16, "subnormal")
    assert x.abs().max() > 0
    for transposed in (False, True):
        require_same("native", partial(quantize_nvfp4, x, block=(16, 16), hadamard=SIGNS, transposed=transposed))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_show_where_the_reference_shows_them(bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = numbers(128, 256, dtype)
        x[5, 7] = bad
        for element, scale, block in FUSED:
            require_same("native", lambda: operand(x, element=element, scale=scale, block=block))  # noqa: B023
        require_same("native", lambda: quantize_mx(x, "e4m3"))  # noqa: B023
        require_same("native", lambda: quantize_fp8(x, "e5m2", block=(1, 128)))  # noqa: B023


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


def test_looking_whether_a_matrix_fits_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.kernels.native import quantise

    monkeypatch.setattr(quantise, "matrix", None)  # which copies
    assert quantise.fits(torch.randn(64, 512)[:, ::2], (1, 16), transposed=True, rotated=True, random=True)
    assert not quantise.fits(torch.randn(18, 512)[:, ::2], None, transposed=True, random=True)
