"""The Triton convolution against the reference in float64: every gradient, documents, windows, slices, slots."""

import random

import pytest
import torch
from tests.kernels.native.gradients import assert_equals_reference
from torch import Tensor

from plait.kernels.triton.conv import DEFAULTS
from plait.ops.conv import causal_conv1d, causal_conv1d_step
from plait.ops.dispatch import BackendError, use

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and stretches so small that short inputs have several, with seams between them."""
    for kernel in ("causal_conv1d", "causal_conv1d_backward"):
        monkeypatch.setitem(DEFAULTS, kernel, {**DEFAULTS[kernel], "BLOCK": 16, "SPAN": 8})


def _check(
    L: int,
    D: int,
    W: int,
    *,
    dtype: torch.dtype,
    device: str,
    B: int = 2,
    bias: bool = True,
    initial: bool = False,
    starts: float | None = None,
    activation: bool = True,
    before: int = 0,
) -> None:
    """Values and gradients of one case; the input is a slice of rows wider by `before` and one."""
    wide = torch.randn(B, L, before + D + 1, device=device).to(dtype)
    given = [wide, torch.randn(D, W, device=device), torch.randn(D, device=device) if bias else None]
    given.append(torch.randn(B, D, W, device=device).to(dtype) if initial else None)
    given.append(torch.rand(B, L, device=device) < starts if starts is not None else None)

    def conv(wide: Tensor, w: Tensor, b: Tensor | None, i: Tensor | None, s: Tensor | None) -> Tensor:
        return causal_conv1d(wide[..., before : before + D], w, b, initial=i, starts=s, activation=activation)

    # taps add up before the last rounding; gradients of the taps are sums over time
    assert_equals_reference(conv, given, backend="triton", growth=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [1, 2, 3, 4])
@pytest.mark.parametrize("L", [1, 2, 8, 9])
def test_equals_its_reference_at_every_seam(L: int, W: int, dtype: torch.dtype, device: str) -> None:
    _check(L, 5, W, dtype=dtype, device=device, initial=True)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_documents_see_and_teach_only_themselves(density: float, device: str) -> None:
    _check(19, 17, 4, dtype=torch.float32, device=device, initial=True, starts=density)


def test_random_shapes(n_shapes: int, device: str) -> None:
    for _ in range(n_shapes):
        _check(
            random.randrange(1, 27),
            random.randrange(1, 33),
            random.choice([1, 2, 3, 4, 4]),
            dtype=random.choice([torch.float32, torch.float16]),
            device=device,
            B=random.randrange(1, 3),
            bias=random.random() < 0.7,
            initial=random.random() < 0.5,
            starts=random.choice([None, 0.1, 0.5]),
            activation=random.random() < 0.8,
            before=random.randrange(9),
        )


def test_a_slice_of_wider_rows_is_read_in_place(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    wide, w = torch.randn(2, 9, 40, device=device), torch.randn(24, 4, device=device)
    with use("reference"):
        expected = causal_conv1d(wide[..., 8:32], w)
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda t: pytest.fail("copied") if t.ndim == 3 else contiguous(t))
    with use("triton"):
        torch.testing.assert_close(causal_conv1d(wide[..., 8:32], w), expected)


def test_any_strides_give_the_same(device: str) -> None:
    x, w = torch.randn(2, 24, 9, device=device).transpose(1, 2), torch.randn(4, 24, device=device).T
    initial = torch.randn(2, 4, 24, device=device).transpose(1, 2)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            results.append(causal_conv1d(x, w, initial=initial))
    torch.testing.assert_close(*results)


def test_more_taps_than_registers_are_left_to_others() -> None:
    with use("triton"), pytest.raises(BackendError):
        causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "D", "W", "slots"),
    [(1, 1, 1, None), (3, 300, 4, None), (2, 63, 2, [4, 0]), (4, 257, 4, [2, -1, 0, -1])],
)
def test_steps_equal_the_reference_and_touch_only_their_slots(
    B: int, D: int, W: int, slots: list[int] | None, dtype: torch.dtype, device: str
) -> None:
    rows = B if slots is None else 6
    wide, window = torch.randn(B, D + 7, device=device).to(dtype), torch.randn(rows, D, W, device=device).to(dtype)
    w, bias = torch.randn(D, W, device=device), torch.randn(D, device=device) if D > 1 else None
    at = None if slots is None else torch.tensor(slots, device=device)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            state = window.clone()
            y = causal_conv1d_step(wide[:, 3 : D + 3], state, w, bias, activation=W > 1, slots=at)
            results.append((y, state))
    (y, state), (expected, moved) = results
    assert torch.equal(state, moved)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    if slots is not None:
        untouched = [row for row in range(rows) if row not in slots]
        assert torch.equal(state[untouched], window[untouched])
        assert not y[[i for i, slot in enumerate(slots) if slot < 0]].any()


def test_slots_of_the_reference_gather_the_pools_rows() -> None:
    x, pool, w = torch.randn(3, 5), torch.randn(7, 5, 4), torch.randn(5, 4)
    slots, before = torch.tensor([6, -1, 2]), pool.clone()
    with use("reference"):
        y = causal_conv1d_step(x, pool, w, slots=slots)
        one_by_one = before[[6, 2]]
        expected = causal_conv1d_step(x[[0, 2]], one_by_one, w)
    assert torch.equal(y[[0, 2]], expected) and not y[1].any()
    assert torch.equal(pool[[6, 2]], one_by_one) and torch.equal(pool[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])
