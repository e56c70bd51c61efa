"""FP8 quantisers against TransformerEngine's and ModelOpt's bits, and rows and tiles against the tensor-wide one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.cast import encode
from plait.ops.dispatch import use
from plait.ops.fp8 import FP8, Block, dequantize_fp8, export_fp8, quantize_fp8, spread
from plait.ops.random import uniform

ELEMENTS: list[FP8] = ["e4m3", "e5m2"]
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """These are the tests of the reference; faster backends are held to it in theirs."""
    with use("reference"):
        yield


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "vectors/fp8_current_scaling.safetensors")


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("element", ELEMENTS)
def test_codes_and_scales_are_those_of_transformer_engine(
    vectors: dict[str, Tensor], element: FP8, power_of_two: bool
) -> None:
    name = f"{element}.te_pow2" if power_of_two else f"{element}.te"
    cases = [key.removesuffix(f".{name}.data") for key in vectors if key.endswith(f".{name}.data")]
    assert len(cases) == (18 if power_of_two else 26)
    for case in cases:
        codes, descale = quantize_fp8(vectors[f"{case}.x"], element, power_of_two=power_of_two)
        assert torch.equal(_bits(codes), vectors[f"{case}.{name}.data"]), case
        assert torch.equal(descale, vectors[f"{case}.{name}.scale_inv"][0]), case


@pytest.mark.parametrize("element", ELEMENTS)
def test_torchao_agrees_but_for_tensors_smaller_than_its_floor(vectors: dict[str, Tensor], element: FP8) -> None:
    cases = [key.removesuffix(f".{element}.torchao.data") for key in vectors if key.endswith(f"{element}.torchao.data")]
    differing = set()
    for case in cases:
        codes, _ = quantize_fp8(vectors[f"{case}.x"], element)
        if not torch.equal(_bits(codes), vectors[f"{case}.{element}.torchao.data"]):
            differing.add(case.partition(".")[2])
    assert len(cases) > 20 and differing == {"tiny", "subnormal"}


@pytest.mark.parametrize("layer", ["a", "b"])
def test_operands_of_a_linear_layer_are_those_of_transformer_engine(shared: Path, layer: str) -> None:
    v = load_file(shared / "vectors/fp8_linear.safetensors")
    q = {}
    operands: list[tuple[str, FP8]] = [("x", "e4m3"), ("w", "e4m3"), ("dy", "e5m2")]
    for name, element in operands:
        codes, descale = quantize_fp8(v[f"{layer}.{name}"], element)
        assert torch.equal(_bits(codes), v[f"{layer}.te.q{name}"])
        assert torch.equal(descale, v[f"{layer}.te.scale_inv_{name}"][0])
        q[name] = dequantize_fp8(codes, descale).double()
    products = {"y": q["x"] @ q["w"].T, "dx": q["dy"] @ q["w"], "dw": q["dy"].T @ q["x"]}
    for name, ours in products.items():
        theirs = v[f"{layer}.te.{name}"].double()
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_exported_weights_are_those_of_modelopt(shared: Path) -> None:
    folder = shared / "vectors/modelopt_export"
    masters, packed = (load_file(folder / f"{kind}/model.safetensors") for kind in ("bf16", "fp8_default"))
    names = [name.removesuffix("_scale") for name in packed if name.endswith(".weight_scale")]
    assert len(names) > 5
    for name in names:
        codes, weight_scale = export_fp8(masters[name], weight_scale=packed[f"{name}_scale"])
        assert torch.equal(_bits(codes), _bits(packed[name])), name
        own = export_fp8(masters[name])[1]
        # q, k and v may share the largest of their scales
        assert own == weight_scale or (own < weight_scale and "_proj" in name), name


BLOCKS: list[Block] = ["row", (1, 128), (1, 16), (1, 32), (16, 16), (128, 128), (3, 5)]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_block_is_quantised_as_a_tensor_of_its_own(block: Block, power_of_two: bool) -> None:
    r, c = (1, 128) if block == "row" else block or (1, 1)
    R, C = 2 * r, (1 if block == "row" else 3) * c
    x = torch.randn(2, R, C) * torch.logspace(-3, 3, R)[:, None]
    x[0, 0, :c] = 0
    codes, descale = quantize_fp8(x, block=block, power_of_two=power_of_two)
    assert codes.shape == x.shape and descale.shape == (2, R // r, C // c)
    for b in range(2):
        for i in range(R // r):
            for j in range(C // c):
                tile = (b, slice(i * r, i * r + r), slice(j * c, j * c + c))
                alone, own = quantize_fp8(x[tile], power_of_two=power_of_two)
                assert torch.equal(_bits(codes[tile]), _bits(alone)) and descale[b, i, j] == own
    error = (dequantize_fp8(codes, descale) - x).abs()
    # half a step of 2^-3, or half a subnormal step at the scale
    assert (error <= torch.maximum(x.abs() * 2.0**-4, spread(descale, x.shape) * 2.0**-10) * (1 + 1e-6)).all()


def test_rounding_at_random_uses_the_numbers_of_its_seed() -> None:
    x = torch.randn(6, 40)
    codes, descale = quantize_fp8(x, "e5m2", seed=99)
    want = encode(x * (1 / descale), "e5m2", noise=uniform(x.shape, seed=99))
    # 1 / (1 / scale) may miss scale by a bit, which moves a code only within a bit of a threshold
    assert (_bits(codes) != _bits(want)).sum() <= 1
    again, other = quantize_fp8(x, "e5m2", seed=99)[0], quantize_fp8(x, "e5m2", seed=100)[0]
    assert torch.equal(_bits(codes), _bits(again)) and not torch.equal(_bits(codes), _bits(other))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_none_shows_in_all_that_share_its_scale_and_nowhere_else(bad: float) -> None:
    x = torch.randn(4, 64)
    x[1, 5] = bad
    for power_of_two in (False, True):
        codes, descale = quantize_fp8(x, power_of_two=power_of_two)
        assert descale.isnan() and dequantize_fp8(codes, descale).isnan().all()
        y = dequantize_fp8(*quantize_fp8(x, block=(1, 32), power_of_two=power_of_two))
        assert y[1, :32].isnan().all() and y.isnan().sum() == 32


@pytest.mark.parametrize("element", ELEMENTS)
def test_no_code_leaves_the_range_whatever_the_size(element: FP8) -> None:
    for size in (1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38):
        x = torch.linspace(-1, 1, 257) * size
        for seed in (None, 3):
            y = quantize_fp8(x, element, seed=seed)[0].float()
            assert y.isfinite().all() and y.abs().max() <= LARGEST[element], size


def test_a_tensor_of_nothing_and_of_zeros() -> None:
    codes, descale = quantize_fp8(torch.zeros(0, 128))
    assert codes.shape == (0, 128) and descale == 1
    codes, descale = quantize_fp8(torch.zeros(0, 128), block=(1, 128))
    assert descale.shape == (0, 1)
    assert (dequantize_fp8(*quantize_fp8(torch.zeros(2, 3))) == 0).all()


@pytest.mark.parametrize(("shape", "block"), [((4, 100), (1, 128)), ((100, 128), (128, 128)), ((128,), (128, 128))])
def test_blocks_that_do_not_divide_are_refused(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pad its last dimension|needs a tensor of 2 dimensions"):
        quantize_fp8(torch.zeros(shape), block=block)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (5, 4), (1, 4, 4)])
def test_scales_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not belong to codes of shape"):
        dequantize_fp8(torch.zeros(8, 16).to(torch.float8_e4m3fn), torch.ones(shape))
