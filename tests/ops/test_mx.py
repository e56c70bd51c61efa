"""MX quantisers against torchao's bits for each way to find a scale, and what the formats promise."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.mx import MXElement, Rounding, dequantize_mx, quantize_mx

ELEMENTS: list[MXElement] = ["e4m3", "e5m2", "e2m1"]
ROUNDINGS: list[Rounding] = ["floor", "rceil", "ceil", "even"]
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """These are the tests of the reference; faster backends are held to it in theirs."""
    with use("reference"):
        yield


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "vectors/mx.safetensors")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_and_scales_are_those_of_torchao(
    vectors: dict[str, Tensor], element: MXElement, rounding: Rounding
) -> None:
    name = f"{element}.torchao_{rounding}"
    cases = [key.removesuffix(f".{name}.data") for key in vectors if key.endswith(f".{name}.data")]
    assert len(cases) == 17 or (element == "e5m2" and rounding in ("ceil", "even") and not cases)
    for case in cases:
        codes, scales = quantize_mx(vectors[f"{case}.x"], element, rounding=rounding)
        assert torch.equal(scales, vectors[f"{case}.{name}.scales"]), case
        assert torch.equal(codes.view(torch.uint8), vectors[f"{case}.{name}.data"]), case


def test_the_default_has_the_scales_of_modelopt(vectors: dict[str, Tensor]) -> None:
    cases = [key.removesuffix(".e4m3.modelopt.scales") for key in vectors if key.endswith(".e4m3.modelopt.scales")]
    assert len(cases) > 10
    for case in cases:
        assert torch.equal(quantize_mx(vectors[f"{case}.x"])[1], vectors[f"{case}.e4m3.modelopt.scales"]), case


@pytest.mark.parametrize("element", ELEMENTS)
def test_rounding_up_scales_saturates_nothing(element: MXElement) -> None:
    x = torch.randn(64, 96) * torch.logspace(-30, 30, 64)[:, None]
    codes, scales = quantize_mx(x, element)
    y = dequantize_mx(codes, scales)
    mantissa = {"e4m3": 3, "e5m2": 2, "e2m1": 1}[element]
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "e2m1": 0.5}[element]
    power = torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    bound = torch.maximum(x.double().abs() * 2.0 ** -(mantissa + 1), power * smallest / 2)
    assert ((y.double() - x).abs() <= bound).all()
    # and a scale half as large would have
    amax = x.double().abs().unflatten(-1, (-1, 32)).amax(-1)
    assert (amax > LARGEST[element] * torch.exp2(scales.double() - 128)).all()


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_number_that_is_none_shows_in_its_block_alone(element: MXElement, rounding: Rounding) -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(3, 64)
        x[1, 40] = bad
        codes, scales = quantize_mx(x, element, rounding=rounding)
        assert scales[1, 1] == 255
        y = dequantize_mx(codes, scales)
        assert y[1, 32:].isnan().all() and y.isnan().sum() == 32


@pytest.mark.parametrize("element", ELEMENTS)
def test_rounding_at_random_is_unbiased_and_repeats_for_a_seed(element: MXElement) -> None:
    x, repeats = torch.randn(1, 64), 16384
    many = x.repeat(repeats, 1)
    y = dequantize_mx(*quantize_mx(many, element, seed=2**40)).double()
    assert torch.equal(y.float(), dequantize_mx(*quantize_mx(many, element, seed=2**40)))
    assert not torch.equal(y.float(), dequantize_mx(*quantize_mx(many, element, seed=2**40 + 1)))
    width = y.amax(0) - y.amin(0)
    p = (y.mean(0) - y.amin(0)) / width
    z = (y.mean(0) - x[0].double()) / (width * (p * (1 - p) / repeats).sqrt())
    assert z.abs().max() < 4.5


def test_subnormal_scales_are_not_lost() -> None:
    x = torch.full((1, 32), 2.0**-125)
    codes, scales = quantize_mx(x, "e2m1", rounding="floor")
    assert scales.item() == 0 and dequantize_mx(codes, scales).max() > 0


def test_lengths_and_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="pad its last dimension to a multiple of 32"):
        quantize_mx(torch.zeros(2, 48))
    with pytest.raises(ValueError, match="floor, rceil, ceil or even"):
        quantize_mx(torch.zeros(2, 32), rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not belong"):
        dequantize_mx(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_smallest_excess_over_the_largest_number_doubles_the_scale(element: MXElement) -> None:
    largest = torch.tensor(LARGEST[element]) * torch.tensor([[2.0**-30], [1.0], [2.0**30]])
    assert quantize_mx(largest.expand(3, 32), element)[1].flatten().tolist() == [97, 127, 157]
    above = torch.nextafter(largest, torch.tensor(torch.inf))
    assert quantize_mx(above.expand(3, 32), element)[1].flatten().tolist() == [98, 128, 158]
