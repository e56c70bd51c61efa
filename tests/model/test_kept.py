"""Forms of memory: rounding at random is right on average and repeats itself, codes of codes are the same codes."""

import pytest
import torch

from plait.model.kept import Kept

CPU = torch.device("cpu")


def kept(form: str, *shape: int) -> Kept:
    return Kept(shape, form, CPU, torch.float32)


@pytest.mark.parametrize("form", ["fp16-sr", "int8-sr"])
def test_rounding_at_random_is_right_on_average_and_the_same_for_the_same_seed(form: str) -> None:
    x = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 1e-6  # below float16's normal numbers
    n, one = 4000, kept(form, 2, 3, 40)
    index = (torch.tensor([1]),)
    mean, seen = torch.zeros(x.shape, dtype=torch.float64), set()
    for seed in range(n):
        one.write(index, x, [seed])
        y = one.read(index)
        mean += y.double() / n
        seen.add(y[0, 1, 1].item())
    # a step between neighbours, whose mean has at most this deviation; six of them for 120 numbers
    step = (
        x.abs().amax(-1, keepdim=True) / 127 if form == "int8-sr" else (x.abs() * 2**-10).clamp(min=2**-24)
    ).expand_as(x)
    assert bool(((mean - x).abs() <= 6 * step / 2 / n**0.5 + 1e-6 * x.abs()).all())
    assert len(seen) == 2
    one.write(index, x, [7])
    first = one.read(index)
    one.write(index, x, [7])
    assert torch.equal(one.read(index), first)
    one.write(index, x)
    assert bool(((one.read(index) - x).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16-sr", "int8-sr", "int8", "fp8"])
def test_what_is_kept_can_be_kept_again(form: str) -> None:
    first, second = kept(form, 4, 2, 17), kept(form, 4, 2, 17)
    x = torch.randn(2, 2, 17, generator=torch.Generator().manual_seed(1)) * 30
    x[0, 0] = 0
    index = (torch.tensor([3, 1]),)
    first.write(index, x, [1, 2] if first.is_random else None)
    once = first.read(index)
    second.write(index, once)
    # a scale of int8 may move in its last bit
    torch.testing.assert_close(second.read(index), once, rtol=3e-7, atol=0)
    worst = {"fp32": 0.0, "bf16": 2**-8, "fp16-sr": 2**-10, "int8-sr": 1 / 127, "int8": 0.5 / 127, "fp8": 2**-4}[form]
    assert bool(((once - x).abs() <= 1.001 * worst * x.abs().amax(-1, keepdim=True)).all())


def test_larger_than_the_largest_becomes_the_largest_and_unknown_forms_are_refused() -> None:
    for form, largest in (("fp8", 448.0), ("fp16-sr", 65504.0)):
        one = kept(form, 1, 2)
        one.write((torch.tensor([0]),), torch.tensor([[1e9, -1e9]]), [3])
        assert one.read((torch.tensor([0]),)).tolist() == [[largest, -largest]]
    with pytest.raises(ValueError, match="form='fp4' is unknown; known: auto, fp32"):
        kept("fp4", 1)
