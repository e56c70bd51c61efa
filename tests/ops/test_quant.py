"""Quantisers against their definition: BitNet's with their gradients, int8 and int4 groups by their bounds."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.quant import (
    dequantize_groups,
    fake_int8,
    fake_ternary,
    pack_int4,
    quantize_groups,
    quantize_int8,
    quantize_ternary,
    unpack_int4,
    weight_only_linear,
)


def test_ternary_rounds_to_the_mean_magnitude() -> None:
    w = torch.tensor([[0.9, -0.2, 0.5], [-3.0, 0.0, 1.4]])
    codes, descale = quantize_ternary(w)  # mean magnitude is 1.0
    assert descale.item() == 1.0
    assert codes.tolist() == [[1, 0, 0], [-1, 0, 1]], "0.5 rounds to the even neighbour"


def test_int8_reaches_127_at_the_largest_of_each_row() -> None:
    x = torch.tensor([[0.5, -2.0, 1.0], [1e-9, 0.0, 0.0]])
    codes, scale = quantize_int8(x)
    assert codes.tolist() == [[32, -127, 64], [0, 0, 0]]
    assert scale[0].item() == 63.5
    assert (codes / scale - x).abs().max() <= 0.5 / 63.5


def test_gradients_go_straight_through() -> None:
    w = torch.randn(4, 5, requires_grad=True)
    for fake in (fake_ternary, fake_int8):
        (grad,) = torch.autograd.grad((fake(w) * torch.arange(20.0).view(4, 5)).sum(), w)
        assert torch.equal(grad, torch.arange(20.0).view(4, 5))


GROUPED = [(bits, group, zeros) for bits in (8, 4) for group in (32, 64, 128) for zeros in (False, True)]


def _weights(n: int, k: int, group: int, size: float, seed: int = 0) -> Tensor:
    """Random weights of a size, with a group of zeros and rows of one sign where there is room."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * size
    w[n // 2, :group] = 0
    w[n // 3] = w[n // 3].abs()
    w[n // 4] = -w[n // 4].abs()
    return w


def _check_groups(w: Tensor, bits: int, group: int, zeros: bool) -> None:
    """Hold a rounding against what its mathematics promises, in float64."""
    codes, scales, points = quantize_groups(w, bits, group, zeros)
    held = dequantize_groups(codes, scales, points, bits=bits)
    assert held.shape == w.shape and held.dtype == torch.float32
    assert scales.dtype == torch.float16 and scales.shape == (w.shape[0], w.shape[1] // group)
    assert (points is None) == (not zeros)
    error = (w.double() - held.double()).abs().unflatten(1, (-1, group))
    s = scales.double().abs()[..., None]
    # the quotient is rounded to float32 before it is rounded to a code
    half = s * (0.5 + 256 * 2.0**-24)
    clipped = torch.zeros_like(error, dtype=torch.bool)
    if bits == 4 and not zeros:
        q = unpack_int4(codes).unflatten(1, (-1, group))
        clipped = (q == 0) | (q == 15)
        # a scale is a tenth of the extreme or more, and the last code 8 or, on the other side, 7; below 2^-14 it has
        # few digits, and two scales may clip at different ends
        assert bool(((error <= 3.01 * s) | (s < 2.0**-14)).all())
        by_seven = (w.float().unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) / 7).half().double()
        plain = torch.where(by_seven > 0, (w.double().unflatten(1, (-1, group)) / by_seven), 0.0).round().clamp(-8, 7)
        theirs = (w.double().unflatten(1, (-1, group)) - plain * by_seven).square().sum(-1)
        assert bool(((error.square().sum(-1) <= theirs * (1 + 1e-4)) | (by_seven[..., 0] < 2.0**-14)).all())
    assert bool(((error <= half) | clipped).all())
    zero = (w.unflatten(1, (-1, group)) == 0).all(-1)
    assert bool((held.unflatten(1, (-1, group))[zero] == 0).all())


@pytest.mark.parametrize(("bits", "group", "zeros"), GROUPED)
@pytest.mark.parametrize("size", [0.02, 1e-4, 3e-7, 1e-9, 1000.0])
def test_no_weight_moves_by_more_than_half_a_scale(bits: int, group: int, zeros: bool, size: float) -> None:
    _check_groups(_weights(9, 256, group, size), bits, group, zeros)


def test_random_shapes_and_sizes_keep_the_bound(n_shapes: int) -> None:
    choose = random.Random(1)
    for i in range(n_shapes):
        bits, group, zeros = choose.choice(GROUPED)
        k = max(group, 64) * choose.randint(1, 3)
        w = _weights(choose.randint(1, 70), k, group, 10 ** choose.uniform(-9, 4), seed=i)
        _check_groups(w.to(choose.choice([torch.float32, torch.bfloat16])), bits, group, zeros)


def test_rows_are_rounded_alike_however_many_there_are() -> None:
    w = _weights(600, 1024, 64, 0.02)  # more than are rounded at a time
    for bits in (4, 8):
        codes, scales, _ = quantize_groups(w, bits, 64)
        few = quantize_groups(w[250:260], bits, 64)
        assert torch.equal(codes[250:260], few[0]) and torch.equal(scales[250:260], few[1])


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 32), (4, 64)])
def test_what_is_rounded_already_stays(bits: int, group: int) -> None:
    codes, scales, _ = quantize_groups(_weights(20, 256, group, 0.02), bits, group)
    held = dequantize_groups(codes, scales, bits=bits)
    again = quantize_groups(held, bits, group)
    assert torch.equal(dequantize_groups(again[0], again[1], bits=bits), held)


def test_every_pair_of_int4_codes_is_packed_and_found_again() -> None:
    low, high = torch.arange(256, dtype=torch.uint8) & 15, torch.arange(256, dtype=torch.uint8) >> 4
    codes = torch.cat([low.view(8, 32), high.view(8, 32)], dim=1).repeat(1, 2)  # (8, 128)
    packed = pack_int4(codes)
    assert packed.shape == (8, 64) and torch.equal(unpack_int4(packed), codes)
    assert torch.equal(packed[:, :32].flatten(), torch.arange(256, dtype=torch.uint8))


def test_the_layout_of_int4_codes() -> None:
    """Byte j of a block holds column j in its low four bits and column 32 + j in the high ones."""
    w = torch.zeros(1, 128)
    w[0, 0], w[0, 5], w[0, 32 + 5], w[0, 64] = -8.0, 3.0, -2.0, 0.25 * -8
    codes, scales, _ = quantize_groups(w, 4, 64)
    assert scales.tolist() == [[1.0, 0.25]]
    assert codes[0, 0].item() == 0 | 8 << 4 and codes[0, 5].item() == 3 + 8 | (-2 + 8) << 4 and codes[0, 32] == 8 << 4


def test_the_extreme_of_an_int4_group_has_the_sign_of_minus_eight() -> None:
    w = torch.zeros(1, 64)
    w[0, 3], w[0, 4] = 8.0, -7.0
    codes, scales, _ = quantize_groups(w, 4, 64)
    assert scales.item() == -1.0
    assert torch.equal(dequantize_groups(codes, scales, bits=4), w)


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 8)])
def test_the_largest_weights_that_a_scale_holds_are_held_and_larger_ones_refused(bits: int, top: int) -> None:
    w = torch.full((2, 64), 65504.0 * top)
    codes, scales, _ = quantize_groups(w, bits, 64)
    assert torch.equal(dequantize_groups(codes, scales, bits=bits), w)
    for wrong in (65520.0 * top, float("inf"), float("nan")):
        w[1, 7] = wrong
        with pytest.raises(ValueError, match="the largest that a float16 scale can hold; keep this tensor in bfloat16"):
            quantize_groups(w, bits, 64)
        if not wrong < 1e30:
            with pytest.raises(ValueError, match="keep this tensor in bfloat16"):
                quantize_groups(w, bits, 64, True)


@pytest.mark.parametrize(
    ("bits", "shape", "group"), [(3, (4, 64), 64), (4, (4, 96), 32), (8, (4, 64), 128), (8, (64,), 64)]
)
def test_shapes_that_do_not_fit_are_refused(bits: int, shape: tuple[int, ...], group: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}, group={group}, shape "):
        quantize_groups(torch.ones(shape), bits, group)


@pytest.mark.parametrize(("bits", "group", "zeros"), GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_product_is_that_of_the_weights_that_the_codes_stand_for(
    bits: int, group: int, zeros: bool, dtype: torch.dtype
) -> None:
    w = _weights(33, 256, group, 0.02)
    codes, scales, points = quantize_groups(w, bits, group, zeros)
    x, bias = torch.randn(2, 3, 256).to(dtype), torch.randn(33)
    with use("reference"):
        y = weight_only_linear(x, codes, scales, points, bias, bits=bits, group=group)
    held = dequantize_groups(codes, scales, points, bits=bits).to(dtype).double()
    exact = x.double() @ held.T + bias.to(dtype).double()
    # sums are longer than float32 keeps: 256 terms of about 0.02 each; a half format is rounded once more
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    torch.testing.assert_close(y.double(), exact, atol=2e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)


def test_bitnet_numbers_are_those_of_transformers(shared: Path) -> None:
    v = load_file(shared / "vectors/bitnet.safetensors")
    cases = [key.removesuffix(".ternary") for key in v if key.endswith(".ternary")]
    assert len(cases) > 20
    for case in cases:
        x = v[f"{case}.x"]
        codes, descale = quantize_ternary(x)
        assert torch.equal(codes, v[f"{case}.ternary"]), case
        assert torch.equal(1 / descale, v[f"{case}.scale"][0]), case
        assert torch.equal(fake_ternary(x), v[f"{case}.weight_fake_quant"]), case
        codes, scale = quantize_int8(x)
        assert torch.equal(codes, v[f"{case}.act_int8"]) and torch.equal(scale, v[f"{case}.act_scale"]), case
        assert torch.equal(fake_int8(x), v[f"{case}.act_fake_quant"]), case


@pytest.mark.parametrize("layer", ["a"])
def test_a_linear_layer_of_bitnet_is_that_of_transformers(shared: Path, layer: str) -> None:
    v = load_file(shared / "vectors/bitnet.safetensors")
    x, w = (v[f"linear.{layer}.{name}"].clone().requires_grad_() for name in ("x", "w"))
    y = fake_int8(x) @ fake_ternary(w).T
    dx, dw = torch.autograd.grad(y, (x, w), v[f"linear.{layer}.dy"])
    for name, ours in {"y": y, "dx": dx, "dw": dw}.items():
        theirs = v[f"linear.{layer}.{name}"]
        # sums of 64 products at most, in another order
        assert (ours - theirs).abs().max() <= 64 * torch.finfo(torch.float32).eps * theirs.abs().max(), name
