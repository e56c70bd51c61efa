"""The operations of one token equal their references in float64: convolution, state, attention."""

import random
from array import array

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.attention import attention
from plait.ops.conv import causal_conv1d_step
from plait.ops.dispatch import use
from plait.ops.ssd import selective_state_update

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)}


def assert_close(got: Tensor, want: Tensor, growth: float = 8) -> None:
    """Equal up to a few roundings of the result's dtype, and what sums in float32 gather."""
    limit = growth * (EPS[got.dtype] + 8 * EPS[torch.float32])
    assert (got.double() - want).abs().max() <= limit * max(float(want.abs().max()), 1)


def check_conv(B: int, D: int, taps: int, dtype: torch.dtype, stored: torch.dtype, bias: bool, silu: bool) -> None:
    x, window = torch.randn(B, 2 * D).to(dtype)[:, D:], torch.randn(B, D, taps).to(stored)
    w, b = torch.randn(D, taps).to(dtype), torch.randn(D).to(dtype) if bias else None
    rounded, wide = x.to(stored).double(), window.double()
    want = causal_conv1d_step.reference(rounded, wide, w.double(), None if b is None else b.double(), activation=silu)
    with use("native"), torch.no_grad():
        got = causal_conv1d_step(x, window, w, b, activation=silu)
    assert got.dtype == dtype
    assert_close(got, want)
    assert torch.equal(window.double(), wide), "the window holds inputs, nothing else"


def check_state(
    B: int, H: int, P: int, G: int, N: int, dtype: torch.dtype, stored: torch.dtype, limit: tuple[float, float]
) -> None:
    state, x, dt = torch.randn(B, H, P, N).to(stored), torch.randn(B, H, P).to(dtype), torch.randn(B, H).to(dtype)
    A, maps = -torch.rand(H), [torch.randn(B, G, N).to(dtype) for _ in range(2)]
    D, bias = (torch.randn(H), 10 * torch.randn(H)) if H % 2 else (None, None)
    wide, rest = state.double(), {"D": D, "dt_bias": bias, "dt_limit": limit}
    want = selective_state_update.reference(
        wide,
        *(t.double() for t in (x, dt, A, *maps)),
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in rest.items()},
    )
    with use("native"), torch.no_grad():
        got = selective_state_update(state, x, dt, A, *maps, **rest)
    assert got.dtype == dtype
    # a state of bfloat16 is rounded before it is read out
    assert_close(got, want) if stored == torch.float32 else assert_close(got.bfloat16(), want, N**0.5 + 8)
    assert_close(state, wide)


def check_attention(B: int, S: int, H: int, K: int, P: int, dtype: torch.dtype, padded: bool) -> None:
    q, room = torch.randn(B, 1, H, P).to(dtype), S + 3
    k, v = (torch.full((B, K, room, P), torch.nan, dtype=dtype) for _ in range(2))
    k[:, :, :S], v[:, :, :S] = torch.randn(B, K, S, P), torch.randn(B, K, S, P)
    k, v = k[:, :, :S].transpose(1, 2), v[:, :, :S].transpose(1, 2)
    mask = torch.arange(S) >= torch.randint(0, S, (B, 1)) if padded else None
    want = attention.reference(q.double(), k.double(), v.double(), key_mask=mask)
    with use("native"), torch.no_grad():
        got = attention(q, k, v, key_mask=mask)
    assert got.dtype == dtype
    assert_close(got, want)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 4), (3, 16, 4), (1, 300, 4), (2, 63, 3), (9, 48, 2)], ids=str)
def test_a_step_of_the_convolution(
    target: str, shape: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype
) -> None:
    check_conv(*shape, dtype, stored, bias=shape[0] % 2 == 0, silu=True)
    check_conv(*shape, dtype, stored, bias=True, silu=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 6, 4, 3, 5), (1, 4, 64, 1, 128), (3, 2, 7, 2, 33)], ids=str)
def test_a_step_of_the_state(target: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for stored in DTYPES:
        check_state(*shape, dtype, stored, (0.0, float("inf")))
        check_state(*shape, dtype, stored, (0.1, 0.4))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1, 1, 1), (2, 63, 4, 2, 6), (1, 64, 6, 1, 64), (2, 300, 5, 5, 80), (1, 5000, 4, 1, 16)],
        *[(2, 1, 3, 1, 32), (1, 31, 9, 1, 96), (2, 33, 8, 2, 128), (1, 4500, 16, 4, 64), (1, 7, 4, 4, 256)],
    ],
    ids=str,
)
def test_attention_of_one_token(
    target: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, padded: bool
) -> None:
    check_attention(*shape, dtype, padded)


@pytest.mark.parametrize("sharpness", [1, 8])
@pytest.mark.parametrize("shape", [(16, 16, 4, 64), (300, 5, 1, 128), (4100, 3, 3, 96)], ids=str)
def test_attention_in_bfloat16_errs_as_little_as_pytorchs(
    target: str, shape: tuple[int, int, int, int], sharpness: float
) -> None:
    """Weights may be rounded like the result: then both err by less than half as much again as its rounding alone."""
    S, H, K, P = shape
    q = (sharpness * torch.randn(2, 1, H, P)).bfloat16()
    k, v = (torch.randn(2, K, S, P).bfloat16().transpose(1, 2) for _ in range(2))
    want = attention.reference(q.double(), k.double(), v.double())
    with use("native"), torch.no_grad():
        got = attention(q, k, v)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True).transpose(1, 2)
    error, others, rounding = ((t.double() - want).square().mean().sqrt() for t in (got, theirs, want.bfloat16()))
    assert error <= 1.5 * rounding and error <= 1.2 * others


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_with_its_query(target: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 70, 64), torch.randn(1, 1, 70, 64)
    q[0, 0, 2, 5] = torch.nan
    with use("native"), torch.no_grad():
        got = attention(q.to(dtype), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2))
    assert got[0, 0, 2].isnan().all() and got[0, 0, [0, 1, 3]].isfinite().all()


def test_a_row_without_keys_gives_zeros(target: str) -> None:
    mask = torch.tensor([[False], [True]]).expand(2, 9)
    for P, dtype in ((8, torch.float32), (64, torch.bfloat16)):
        q, k = torch.randn(2, 1, 4, P).to(dtype), torch.randn(2, 2, 9, P).to(dtype).transpose(1, 2)
        with use("native"), torch.no_grad():
            got = attention(q, k, k, key_mask=mask)
        assert (got[0] == 0).all() and (got[1] != 0).all()


def test_random_shapes_agree(n_shapes: int) -> None:
    rng = random.Random(0)
    for _ in range(n_shapes):
        B, dtype, stored, G, K = rng.randint(1, 9), *rng.choices(DTYPES, k=2), rng.randint(1, 4), rng.randint(1, 3)
        check_conv(B, rng.randint(1, 100), rng.randint(1, 5), dtype, stored, rng.random() < 0.5, rng.random() < 0.5)
        limit = rng.choice([(0.0, float("inf")), (0.01, 0.1)])
        check_state(B, G * rng.randint(1, 4), rng.randint(1, 40), G, rng.randint(1, 140), dtype, stored, limit)
        length = rng.choice([1, 2, 63, 64, 65, 257, 700])
        P = rng.choice([rng.randint(1, 90), 32 * rng.randint(1, 4)])
        check_attention(B, length, K * rng.randint(1, 6), K, P, dtype, rng.random() < 0.5)


def test_copies_are_compared_with_their_masters() -> None:
    from plait.kernels.native.decode import copies_hold

    master = torch.randn(50)
    for number, other, holds in (
        (1.5, 1.5, True),
        (1.5, -1.5, False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.5, False),
        (float("nan"), float("inf"), False),
        (1.5, float("nan"), False),
    ):
        pair = master.fill_(number), torch.full((50,), other, dtype=torch.bfloat16)
        assert copies_hold(array("q", [*(t.data_ptr() for t in pair), 50]), 3) is holds, (number, other)
    # of several, one
    right = torch.randn(33)
    kept = right.bfloat16()
    words = [right.data_ptr(), kept.data_ptr(), 33]
    assert copies_hold(array("q", words), 0) and not copies_hold(
        array("q", [*words, *(t.data_ptr() for t in pair), 50]), 0
    )
    assert copies_hold(array("q"), 0)
