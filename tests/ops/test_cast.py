"""Element casts against ml_dtypes' answers, and stochastic rounding against its definition: in the mean, x itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.cast import MINIFLOATS, Element, decode, encode, pack_fp4, unpack_fp4
from plait.ops.random import uniform

FORMATS: list[Element] = ["e4m3", "e5m2", "e2m1"]


@pytest.fixture(scope="module")
def casts(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "vectors/element_casts.safetensors")


def _grid(element: Element) -> Tensor:
    """All finite numbers of a format, in order, without minus zero."""
    values = decode(torch.arange(16 if element == "e2m1" else 256, dtype=torch.uint8), element)
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_fp8_codes_are_the_public_ones(casts: dict[str, Tensor], element: Element) -> None:
    x = casts["x"]
    codes = encode(x, element)
    number = ~x.isnan()
    assert torch.equal(codes.view(torch.uint8)[number], casts[f"{element}.saturating"][number])
    assert codes[~number].float().isnan().all() and (~number).any()


def test_e2m1_and_e8m0_codes_are_the_public_ones(casts: dict[str, Tensor]) -> None:
    assert torch.equal(encode(casts["e2m1.x"], "e2m1"), casts["e2m1.codes"])
    assert torch.equal(encode(casts["e8m0.x"], "e8m0"), casts["e8m0.codes_nearest"])


@pytest.mark.parametrize("element", [*FORMATS, "e8m0"])
def test_every_code_has_its_value(casts: dict[str, Tensor], element: Element) -> None:
    theirs = casts[f"decode.{element}"]
    ours = decode(torch.arange(len(theirs), dtype=torch.uint8), element)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("element", FORMATS)
def test_codes_of_values_are_the_codes(element: Element) -> None:
    grid = _grid(element)
    assert torch.equal(decode(encode(grid, element), element), grid)
    # bfloat16 holds each value, so it is no other number there
    assert torch.equal(decode(encode(grid.bfloat16(), element), element), grid)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("element", FORMATS)
def test_what_is_too_large_becomes_the_largest_and_nan_is_named(element: Element, noise: bool) -> None:
    largest = MINIFLOATS[element].largest
    x = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 1.04 * largest, largest, torch.nan, 0.0, -0.0])
    u = torch.full_like(x, 1 - 2**-24) if noise else None
    y = decode(encode(x, element, noise=u), element)
    assert y[:6].tolist() == [largest, -largest, largest, -largest, largest, largest]
    assert y[6].isnan() if element != "e2m1" else y[6] == 0
    assert y[7:].tolist() == [0, 0] and y[7:].signbit().tolist() == [False, True]


def _between(element: Element) -> Tensor:
    """Numbers of both signs at tenths between all neighbours, subnormal ones too."""
    grid = _grid(element)
    return torch.cat([torch.lerp(grid[:-1], grid[1:], t) for t in (0.0, 0.1, 0.5, 0.9)]).clamp(-1e38, 1e38)


@pytest.mark.parametrize("element", FORMATS)
def test_random_rounding_takes_a_neighbour_and_keeps_what_is_exact(element: Element) -> None:
    grid, x = _grid(element), _between(element)
    place = torch.searchsorted(grid, x)
    above, below = grid[place], grid[(place - (grid[place] != x).long()).clamp(min=0)]
    ends = [decode(encode(x, element, noise=torch.full_like(x, u)), element) for u in (0.0, 0.5, 1 - 2**-24)]
    for y in ends:
        assert ((y == above) | (y == below)).all()
        assert torch.equal(y[x == above], x[x == above])
    away, _, toward = ends
    assert torch.equal(away.abs(), torch.maximum(above.abs(), below.abs()))
    assert torch.equal(toward.abs(), torch.minimum(above.abs(), below.abs()))


@pytest.mark.parametrize("element", FORMATS)
def test_random_rounding_is_unbiased_over_a_million_draws(element: Element) -> None:
    # numbers spread over the whole format, each between two neighbours; the same ones many times
    points = _between(element)
    points = points[torch.linspace(0, len(points) - 1, 64).long()]
    repeats = (1 << 20) // len(points)
    x = points.repeat(repeats, 1)
    y = decode(encode(x, element, noise=uniform(x.shape, seed=2**50 + 1)), element).double()
    distance = (y.amax(0) - y.amin(0)).clamp(min=1e-30)
    p = (y - y.amin(0)).mean(0) / distance
    error = (p * (1 - p) / repeats).sqrt() * distance
    z = (y.mean(0) - points.double()) / error.clamp(min=1e-30)
    exact = points == y[0].float()
    # 64 z-scores, and their sum: each beyond 4.5 has a chance of 7e-6
    assert z[~exact].abs().max() < 4.5
    assert abs(z[~exact].sum()) < 4.5 * len(z) ** 0.5
    assert (~exact).sum() > 20


def test_chances_of_e2m1_are_those_worked_out_elsewhere(shared: Path) -> None:
    v = load_file(shared / "vectors/nvfp4_stochastic.safetensors")
    x, p, repeats = v["x"], v["p_away_derived"], 1024
    y = decode(encode(x.repeat(repeats, 1), "e2m1", noise=uniform((repeats, len(x)), seed=11)), "e2m1")
    away, toward = y == v["away_derived"], y == v["toward_zero_derived"]
    assert (away | toward).all()
    # the chance is exact: the threshold of u lies within one step of the draws' grid
    for sign in (-1, 1):
        u = (p + sign * 2.0**-23).clamp(0, 1 - 2**-24)
        got = decode(encode(x, "e2m1", noise=u), "e2m1")
        sure = (u - p).abs() > 2.0**-24
        want = v["away_derived"] if sign < 0 else v["toward_zero_derived"]
        assert torch.equal(got[sure], want[sure])
    error = (p * (1 - p) / repeats).sqrt().clamp(min=1e-9)
    drawn = (p > 0) & (p < 1)
    z = ((away.float().mean(0) - p) / error)[drawn & (v["away_derived"] != v["toward_zero_derived"])]
    assert z.abs().max() < 4.5 and abs(z.sum()) < 4.5 * len(z) ** 0.5


@pytest.mark.parametrize("shape", [(2,), (3, 4), (0, 8), (2, 3, 16)])
def test_packing_two_codes_a_byte_loses_nothing(shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_fp4(codes)
    assert packed.shape[-1] == shape[-1] // 2 and torch.equal(unpack_fp4(packed), codes)
    assert packed.numel() == 0 or packed.view(-1)[0] == codes.view(-1)[0] + 16 * codes.view(-1)[1]


def test_bad_requests_are_refused_in_words() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="pad the rows"):
        pack_fp4(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="e4m3, e5m2, e2m1"):
        encode(x, "e3m4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise has shape"):
        encode(x, "e4m3", noise=torch.zeros(2))
    with pytest.raises(ValueError, match="leave noise out"):
        encode(x, "e8m0", noise=x)
