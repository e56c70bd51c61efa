"""The native scan against the recurrence in float64: values, every gradient, sizes that fit no tile, views."""

import random

import pytest
import torch
from torch import Tensor

from plait.kernels.native import ssd as native
from plait.ops.dispatch import use
from plait.ops.ssd import ssd

DTYPES = [torch.float32, torch.bfloat16]
# error of a tensor relative to its norm; single numbers cancel now and then. In bfloat16 results are rounded once (a
# relative 1.7e-3 on average) and the operands of products once more; in float32 sums of log decays, up to a thousand in
# a chunk here, lose most
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2**-7}


def _inputs(L: int, H: int, G: int, P: int, N: int, dtype: torch.dtype, b: int = 2) -> dict[str, Tensor]:
    """x, B and C lie in one wider row, as the convolution leaves them; dt in the projection's."""
    given = {
        "xBC": torch.randn(b, L, H * P + 2 * G * N).to(dtype),
        "dt": torch.randn(b, L, 3 + H).to(dtype),
        "A": -torch.empty(H).uniform_(0.5, 16),
        "D": torch.randn(H),
        "dt_bias": torch.empty(H).uniform_(-6, 1),
        "initial_state": torch.randn(b, H, P, N),
    }
    given["sizes"] = torch.tensor([H, G, P, N])
    return given


def _run(backend: str, given: dict[str, Tensor], wide: bool = False, **rest: object) -> dict[str, Tensor]:
    """Outputs and the gradients of a random combination of them."""
    H, G, P, N = given["sizes"].tolist()
    t = {k: (v.double() if wide else v).detach().requires_grad_() for k, v in given.items() if k != "sizes"}
    x, B, C = t["xBC"].split([H * P, G * N, G * N], -1)
    named = {k: t[k] for k in ("D", "dt_bias", "initial_state") if k in t}
    with use(backend):
        y, last = ssd(
            x.unflatten(-1, (H, P)), t["dt"][..., 3:], t["A"], B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)),
            **named, **rest,  # type: ignore[arg-type]
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(y.shape, generator=generator).to(given["xBC"].dtype).to(y.dtype)
    v = torch.randn(last.shape, generator=generator).to(last.dtype)
    gradients = torch.autograd.grad((y, last), list(t.values()), (w, v))
    return {"y": y.detach(), "last": last.detach(), **dict(zip(t, gradients, strict=True))}


def _assert_equal(given: dict[str, Tensor], **rest: object) -> None:
    dtype = given["xBC"].dtype
    fast, exact = _run("native", given, **rest), _run("reference", given, wide=True, **rest)
    for name, want in exact.items():
        got = fast[name]
        assert got.dtype == (dtype if name == "y" else given.get(name, given["A"]).dtype)
        limit, scale = LIMIT[dtype], want.norm()
        if name in ("A", "dt_bias"):
            # sums over all tokens of terms of either sign, about as large as the time steps' gradients
            scale = torch.maximum(scale, exact["dt"].norm())
        off = float((got.double() - want).norm() / scale.clamp(min=1e-2))
        assert off <= limit, f"{name} {tuple(got.shape)}: off by {off:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [1, 63, 64, 65, 130])
def test_native_scan_equals_the_recurrence(target: str, dtype: torch.dtype, L: int) -> None:
    _assert_equal(_inputs(L, 4, 2, 16, 32, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "G", "P", "N"), [(1, 1, 1, 1), (3, 1, 5, 7), (4, 4, 33, 40), (2, 1, 64, 128)], ids=str)
def test_odd_heads_groups_and_sizes(target: str, dtype: torch.dtype, H: int, G: int, P: int, N: int) -> None:
    _assert_equal(_inputs(70, H, G, P, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_starts_padding_and_limits(target: str, dtype: torch.dtype) -> None:
    starts, mask = torch.rand(2, 150) < 0.05, torch.rand(2, 150) < 0.8
    given = _inputs(150, 4, 2, 16, 9, dtype)
    _assert_equal(given, starts=starts)
    _assert_equal(given, mask=mask)
    _assert_equal(given, starts=starts, mask=mask, dt_limit=(0.1, 0.6))
    everywhere = torch.ones_like(starts)
    _assert_equal({k: v for k, v in given.items() if k != "initial_state"}, starts=everywhere)


def test_each_of_the_optional_inputs_may_be_absent(target: str) -> None:
    given = _inputs(66, 4, 2, 8, 8, torch.float32)
    for absent in ("D", "dt_bias", "initial_state"):
        _assert_equal({k: v for k, v in given.items() if k != absent})


@pytest.mark.timeout(1800)  # the reference walks a thousand sequences token by token
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(target: str, dtype: torch.dtype, n_shapes: int) -> None:
    for _ in range(n_shapes if n_shapes > 20 else 8):
        G, R = random.choice([1, 2, 3]), random.choice([1, 2, 4])
        L, P, N = random.randint(1, 140), random.choice([1, 7, 16, 40]), random.choice([1, 3, 16, 33])
        rest: dict[str, object] = {}
        if random.random() < 0.5:
            rest["starts"] = torch.rand(2, L) < random.choice([0.02, 0.3])
        if random.random() < 0.5:
            rest["mask"] = torch.arange(L) < torch.tensor([[L], [random.randint(1, L)]])
        if random.random() < 0.3:
            rest["dt_limit"] = (0.01, 1.0)
        _assert_equal(_inputs(L, G * R, G, P, N, dtype), **rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_a_group_may_be_shared_out_to_threads(
    target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_splits", lambda groups, heads: heads)
    _assert_equal(_inputs(66, 4, 1, 8, 8, dtype))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [native._splits(*sizes) for sizes in ((8, 4), (4, 4), (1, 4), (1, 9), (3, 1))] == [1, 2, 4, 9, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_decay_neither_overflows_nor_underflows_into_gradients(target: str, dtype: torch.dtype) -> None:
    given = _inputs(130, 2, 1, 16, 16, dtype)
    given["dt"] += 50
    given["A"] *= 20
    for name, t in _run("native", given).items():
        assert bool(t.isfinite().all()), name


def test_a_time_step_that_is_no_number_shows(target: str) -> None:
    given = _inputs(80, 2, 1, 16, 16, torch.float32)
    given["dt"][1, 70, 4] = float("nan")
    y = _run("native", given)["y"]
    assert y[1, 70:, 1].isnan().all() and not y[0].isnan().any() and not y[1, :, 0].isnan().any()


def test_a_long_sequence_drifts_no_further(target: str) -> None:
    """A thousand tokens with slow decay: the state carried is float32 whatever the inputs are."""
    given = _inputs(1000, 2, 1, 16, 32, torch.bfloat16, b=1)
    given["A"] *= 1e-2
    _assert_equal(given)


def test_other_dtypes_take_another_road() -> None:
    given = _inputs(9, 2, 1, 4, 4, torch.float32)
    for dtype in (torch.float64, torch.float16):
        x, B = torch.randn(1, 9, 2, 4).to(dtype), torch.randn(1, 9, 1, 4).to(dtype)
        y, _ = ssd(x, given["dt"][:1, :, 3:].to(dtype), given["A"].to(dtype), B, B)
        assert y.dtype == dtype
