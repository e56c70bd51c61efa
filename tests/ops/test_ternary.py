"""Ternary products in whole numbers: the layout of packed codes, and sums that are exactly those of training."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.quant import fake_int8, fake_ternary, quantize_int8, quantize_ternary
from plait.ops.ternary import pack_ternary, packed_width, ternary_linear, unpack_ternary


def random_codes(N: int, K: int) -> Tensor:
    return torch.randint(-1, 2, (N, K), dtype=torch.int8)


def test_a_block_of_256_columns_lies_in_64_bytes() -> None:
    codes = torch.zeros(1, 300, dtype=torch.int8)
    codes[0, 3], codes[0, 64 + 3], codes[0, 128 + 3], codes[0, 192 + 3], codes[0, 256] = -1, 1, 1, -1, 1
    packed = pack_ternary(codes)
    assert packed.shape == (1, packed_width(300)) == (1, 128) and packed.dtype == torch.uint8
    # value + 1 from the low bits up: 0, 2, 2, 0; elsewhere 1, 1, 1, 1; past the end 0 is stored as 1 too
    assert packed[0, 3] == 0b00_10_10_00 and packed[0, 2] == 0b01_01_01_01
    assert packed[0, 64] == 0b01_01_01_10 and packed[0, 127] == 0b01_01_01_01


def test_unpacking_gives_what_was_packed(n_shapes: int) -> None:
    for _ in range(n_shapes):
        codes = random_codes(random.randrange(1, 9), random.randrange(1, 800))
        assert torch.equal(unpack_ternary(pack_ternary(codes), codes.shape[1]), codes)


@pytest.mark.parametrize("K", [1, 64, 176, 256, 700])
def test_sums_are_those_of_whole_numbers(K: int) -> None:
    codes, x = random_codes(31, K), torch.randint(-127, 128, (5, K)).double()
    x[:, 0] = 127  # so that s = 1: the codes are x itself
    y = ternary_linear.reference(x.float(), pack_ternary(codes), torch.ones(31))
    assert torch.equal(y.double(), x @ codes.double().t())


def test_it_is_what_training_computes_but_for_the_last_bits() -> None:
    w, x = torch.randn(40, 300, dtype=torch.float64), torch.randn(7, 300, dtype=torch.float64)
    codes, scale = quantize_ternary(w.float())
    y = ternary_linear.reference(x.float(), pack_ternary(codes), scale.expand(40))
    want = F.linear(fake_int8(x.float()).double(), fake_ternary(w.float()).double())
    assert (y.double() - want).abs().max() < 1e-5 * want.abs().max()


def test_rows_of_x_do_not_touch_each_other_and_none_may_be_lost() -> None:
    x, codes, scales = torch.randn(6, 300), pack_ternary(random_codes(17, 300)), torch.rand(17)
    x[1, 7], x[2], x[3] = torch.nan, 0, 1e-9
    y = ternary_linear(x, codes, scales)
    assert y[1].isnan().all() and y[[0, 2, 3, 4, 5]].isfinite().all() and (y[2] == 0).all()
    assert torch.equal(ternary_linear(x[4:5], codes, scales), y[4:5])


def test_the_triton_kernel_equals_the_reference_bit_for_bit(n_shapes: int, device: str) -> None:
    pytest.importorskip("triton")
    for _ in range(min(n_shapes, 300)):
        M, N = random.choice([1, 2, 5, 16, 17, 40]), random.choice([1, 3, 17, 64, 100])
        K = random.choice([1, 7, 64, 176, 255, 256, 257, 512, 700])
        x = torch.randn(M, K, device=device) * random.choice([1e-7, 1.0, 100.0])
        if random.random() < 0.3:
            x = (4 * x).round() / 4  # many ties
        codes, scales = pack_ternary(random_codes(N, K)).to(device), torch.rand(N, device=device)
        bias = torch.randn(N, device=device) if random.random() < 0.5 else None
        with use("triton"):
            y = ternary_linear(x, codes, scales, bias)
        assert torch.equal(y, ternary_linear.reference(x, codes, scales, bias)), (M, N, K)


@pytest.mark.gpu
def test_the_triton_kernel_equals_the_reference_in_bfloat16_and_at_the_2b_sizes() -> None:
    for M, N, K in ((1, 2560, 6912), (64, 6912, 2560), (300, 640, 2560)):
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        codes, scales = pack_ternary(random_codes(N, K)).cuda(), torch.rand(N, device="cuda")
        with use("triton"):
            y = ternary_linear(x, codes, scales)
        q, s = quantize_int8(x)
        sums = q.double() @ unpack_ternary(codes, K).double().t()
        assert torch.equal(y, (sums.float() * (scales * (1 / s))).bfloat16())
