"""NVFP4 quantisers against TransformerEngine's bits for training and ModelOpt's for export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.cast import decode, unpack_fp4
from plait.ops.dispatch import use
from plait.ops.hadamard import SIGNS, hadamard16
from plait.ops.nvfp4 import (
    Block,
    dequantize_nvfp4,
    export_nvfp4,
    global_descale,
    quantize_nvfp4,
)

BLOCKS: list[Block] = [(1, 16), (16, 16)]
FILES: dict[Block, str] = {(1, 16): "nvfp4_1d", (16, 16): "nvfp4_2d"}


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """These are the tests of the reference; faster backends are held to it in theirs."""
    with use("reference"):
        yield


def _vectors(shared: Path, name: str) -> dict[str, Tensor]:
    return load_file(shared / f"vectors/{name}.safetensors")


def _cases(v: dict[str, Tensor], ending: str) -> Iterator[str]:
    cases = [key.removesuffix(f".{ending}") for key in v if key.endswith(f".{ending}")]
    assert cases
    yield from cases


def _assert_codes(q: tuple[Tensor, Tensor, Tensor], v: dict[str, Tensor], name: str, rows: int = 1) -> None:
    """Codes, scales (repeated over the rows of a block) and amax are bit for bit those of a case."""
    codes, scales, amax = q
    assert torch.equal(codes, v[f"{name}_codes"]), name
    assert torch.equal(scales.view(torch.uint8).repeat_interleave(rows, 0), v[f"{name}_scales"]), name
    assert torch.equal(amax, v[f"{name}_amax"][0]), name


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("side", ["row", "col"])
def test_codes_and_scales_are_those_of_transformer_engine(shared: Path, block: Block, side: str) -> None:
    v = _vectors(shared, FILES[block])
    for case in _cases(v, f"te.{side}_codes"):
        q = quantize_nvfp4(v[f"{case}.x"], block=block, transposed=side == "col")
        _assert_codes(q, v, f"{case}.te.{side}", block[0])


def test_decoded_numbers_are_those_of_transformer_engine(shared: Path) -> None:
    v = _vectors(shared, "nvfp4_1d")
    for case in _cases(v, "te.row_dequant"):
        assert torch.equal(dequantize_nvfp4(*quantize_nvfp4(v[f"{case}.x"])), v[f"{case}.te.row_dequant"]), case


def test_rotated_codes_are_those_of_transformer_engine(shared: Path) -> None:
    v = _vectors(shared, "nvfp4_rht")
    for case in _cases(v, "te.col_codes"):
        x = v[f"{case}.x"]
        _assert_codes(quantize_nvfp4(x), v, f"{case}.te.row")
        codes, scales, amax = quantize_nvfp4(x, hadamard=SIGNS, transposed=True)
        if case.endswith("grid") or case.startswith("bf16"):
            _assert_codes((codes, scales, amax), v, f"{case}.te.col")
        # float32 sums of other numbers depend on the order of additions in their last bit
        differ = (unpack_fp4(codes) != unpack_fp4(v[f"{case}.te.col_codes"])).float().mean()
        assert differ <= 0.002, case
        torch.testing.assert_close(amax, v[f"{case}.te.col_amax"][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer", ["a", "b"])
def test_operands_and_products_of_a_linear_layer_are_those_of_transformer_engine(shared: Path, layer: str) -> None:
    v = _vectors(shared, "nvfp4_linear")
    row, col = {}, {}
    for name in ("x", "w", "dy"):
        block: Block = (16, 16) if name == "w" else (1, 16)
        signs = None if name == "w" else SIGNS
        x = v[f"{layer}.{name}"]
        q = quantize_nvfp4(x, block=block)
        q_t = quantize_nvfp4(x, block=block, hadamard=signs, transposed=True)
        _assert_codes(q, v, f"{layer}.te.q{name}.row", block[0])
        _assert_codes(q_t, v, f"{layer}.te.q{name}.col", block[0])
        row[name], col[name] = dequantize_nvfp4(*q).double(), dequantize_nvfp4(*q_t).double()
    products = {"y": row["x"] @ row["w"].T, "dx": row["dy"] @ col["w"].T, "dw": col["dy"] @ col["x"].T}
    for name, ours in products.items():
        theirs = v[f"{layer}.te.{name}"].double()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_exported_codes_are_those_of_modelopt(shared: Path) -> None:
    v = _vectors(shared, "nvfp4_1d")
    for case in _cases(v, "modelopt.codes"):
        codes, scales, scale_2 = export_nvfp4(v[f"{case}.x"])
        assert torch.equal(codes, v[f"{case}.modelopt.codes"]), case
        assert torch.equal(scales.view(torch.uint8), v[f"{case}.modelopt.scales"]), case
        assert torch.equal(scale_2, v[f"{case}.modelopt.scale_2"]), case


@pytest.mark.parametrize("kind", ["nvfp4_default", "w4a16_nvfp4"])
def test_an_exported_checkpoint_is_that_of_modelopt(shared: Path, kind: str) -> None:
    folder = shared / "vectors/modelopt_export"
    masters, packed = (load_file(folder / f"{name}/model.safetensors") for name in ("bf16", kind))
    names = [name.removesuffix("_scale_2") for name in packed if name.endswith(".weight_scale_2")]
    assert len(names) > 5
    for name in names:
        codes, scales, _ = export_nvfp4(masters[name], scale_2=packed[f"{name}_scale_2"])
        assert torch.equal(codes, packed[name]), name
        assert torch.equal(scales.view(torch.uint8), packed[f"{name}_scale"].view(torch.uint8)), name
        own = export_nvfp4(masters[name])[2]
        # q, k and v share the largest of their three
        assert own == packed[f"{name}_scale_2"] or (own < packed[f"{name}_scale_2"] and "_proj" in name), name


def test_a_weight_and_its_transpose_are_the_same_numbers() -> None:
    w = torch.randn(48, 80)
    y = dequantize_nvfp4(*quantize_nvfp4(w, block=(16, 16)))
    assert torch.equal(y.T, dequantize_nvfp4(*quantize_nvfp4(w, block=(16, 16), transposed=True)))
    assert torch.equal(y.T, dequantize_nvfp4(*quantize_nvfp4(w.T.contiguous(), block=(16, 16))))


def test_transposed_means_the_transpose_is_quantised_with_numbers_counted_there() -> None:
    x = torch.randn(2, 32, 48)
    for hadamard in (None, SIGNS):
        for seed in (None, 5):
            ours = quantize_nvfp4(x, hadamard=hadamard, seed=seed, transposed=True)
            want = quantize_nvfp4(x.mT.contiguous(), hadamard=hadamard, seed=seed)
            for a, b in zip(ours, want, strict=True):
                assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_codes_times_block_scales_are_exact_in_bfloat16() -> None:
    codes, scales, amax = quantize_nvfp4(torch.randn(64, 256) * torch.logspace(-4, 4, 64)[:, None])
    values = decode(unpack_fp4(codes), "e2m1") * decode(scales, "e4m3").repeat_interleave(16, -1)
    assert torch.equal(values.bfloat16().float(), values)
    y = dequantize_nvfp4(codes, scales, amax)
    torch.testing.assert_close(values * global_descale(amax), y, rtol=2e-7, atol=0)


def test_storage_is_four_and_a_half_bits_a_number() -> None:
    x = torch.randn(64, 512)
    codes, scales, amax = quantize_nvfp4(x)
    assert 8 * (codes.nbytes + scales.nbytes) == 4.5 * x.numel() and amax.nbytes == 4
    codes, scales, _ = quantize_nvfp4(x, block=(16, 16))
    assert 8 * (codes.nbytes + scales.nbytes) == (4 + 8 / 256) * x.numel()


@pytest.mark.parametrize("rotated", [False, True])
def test_rounding_at_random_is_unbiased_and_repeats_for_a_seed(rotated: bool) -> None:
    x, repeats = torch.randn(1, 64), 16384
    many, signs = x.repeat(repeats, 1), SIGNS if rotated else None
    y = dequantize_nvfp4(*quantize_nvfp4(many, hadamard=signs, seed=2**40))
    assert torch.equal(y, dequantize_nvfp4(*quantize_nvfp4(many, hadamard=signs, seed=2**40)))
    assert not torch.equal(y, dequantize_nvfp4(*quantize_nvfp4(many, hadamard=signs, seed=2**40 + 1)))
    want, y = (hadamard16(x) if rotated else x)[0].double(), y.double()
    width = y.amax(0) - y.amin(0)
    p = (y.mean(0) - y.amin(0)) / width.clamp(min=1e-9)
    z = (y.mean(0) - want) / (width * (p * (1 - p) / repeats).sqrt()).clamp(min=1e-9)
    # the largest of a block may be clamped: its scale was rounded down
    inside = (want > y.amin(0)) & (want < y.amax(0))
    assert inside.sum() >= 56 and z[inside].abs().max() < 4.5


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_number_that_is_none_shows_everywhere(bad: float, block: Block, seed: int | None) -> None:
    x = torch.randn(32, 64)
    x[3, 7] = bad
    assert quantize_nvfp4(x, block=block, seed=seed)[2].isnan()
    assert dequantize_nvfp4(*quantize_nvfp4(x, block=block, seed=seed)).isnan().all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_any_size_decodes_to_finite_numbers(size: float) -> None:
    x = torch.linspace(-1, 1, 64) * size
    for seed in (None, 3):
        y = dequantize_nvfp4(*quantize_nvfp4(x, seed=seed))
        assert y.isfinite().all() and y.abs().max() <= 1.07 * x.abs().max().clamp(min=1e-38)


def test_lengths_that_do_not_fit_are_refused() -> None:
    calls = (
        lambda: quantize_nvfp4(torch.zeros(4, 40)),
        lambda: quantize_nvfp4(torch.zeros(40, 32), block=(16, 16)),
        lambda: quantize_nvfp4(torch.zeros(40, 32), transposed=True),
        lambda: export_nvfp4(torch.zeros(4, 40)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="pad its last dimension to a multiple of 16"):
            call()
    codes, scales, amax = quantize_nvfp4(torch.randn(16, 32))
    with pytest.raises(ValueError, match="do not belong"):
        dequantize_nvfp4(codes, scales[:3], amax)
