"""The Triton step of the state space against the reference: values, pools of states, half states, fair rounding."""

import random

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import BackendError, use
from plait.ops.ssd import selective_state_update

HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def _inputs(
    B: int = 3, H: int = 6, G: int = 3, P: int = 5, N: int = 7, *, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"state": (B, H, P, N), "x": (B, H, P), "dt": (B, H), "A": (H,), "B": (B, G, N), "C": (B, G, N)}
    t = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    t |= {"D": torch.randn(H, device=device), "dt_bias": torch.randn(H, device=device), "A": -t["A"].exp()}
    return {name: v.to(dtype) if name in ("x", "dt", "B", "C") else v for name, v in t.items()}


def _run(t: dict[str, Tensor], backend: str, **rest: object) -> tuple[Tensor, Tensor]:
    """y, and the state after it."""
    t = {**t, "state": t["state"].clone()}
    with use(backend):
        return selective_state_update(**t, **rest), t["state"]  # type: ignore[arg-type]


def _check(t: dict[str, Tensor], **rest: object) -> None:
    """Against float64: float32 arithmetic, one rounding of y and of the state to their formats."""
    exact = _run({k: v.double() for k, v in t.items()}, "reference", **rest)
    for got, want, like in zip(_run(t, "triton", **rest), exact, (t["x"], t["state"]), strict=True):
        assert got.dtype == like.dtype
        limit = torch.finfo(got.dtype).eps * 0.51 + 32 * torch.finfo(torch.float32).eps
        assert float((got.double() - want).abs().max()) <= limit * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("state", [torch.float32, *HALF], ids=str)
def test_equals_the_reference_in_every_format(state: torch.dtype, dtype: torch.dtype, device: str) -> None:
    t = _inputs(device=device, dtype=dtype)
    t["state"] = t["state"].to(state)
    _check(t)
    _check(t, dt_limit=(0.2, 1.5))


@pytest.mark.parametrize(
    ("H", "G", "P", "N"), [(1, 1, 1, 1), (4, 1, 33, 16), (2, 2, 64, 128), (8, 2, 70, 130)], ids=str
)
def test_equals_the_reference_at_odd_sizes(H: int, G: int, P: int, N: int, device: str) -> None:
    t = _inputs(2, H, G, P, N, device=device)
    _check(t)
    _check({k: v for k, v in t.items() if k not in ("D", "dt_bias")})


def test_extreme_time_steps(device: str) -> None:
    t = _inputs(device=device)
    t["dt"] = torch.linspace(-90, 90, 18, device=device).view(3, 6)
    _check(t)
    # a time step of e^-40 must not round to nothing
    t["dt"], t["state"] = torch.full((3, 6), -40.0, device=device), torch.zeros_like(t["state"])
    del t["dt_bias"], t["D"]
    (got, _), (want, _) = _run(t, "triton"), _run({k: v.double() for k, v in t.items()}, "reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-22)


def test_random_shapes(n_shapes: int, device: str) -> None:
    for _ in range(n_shapes):
        G, B, S = random.randrange(1, 4), random.randrange(1, 4), 5
        t = _inputs(B, G * random.randrange(1, 4), G, random.randrange(1, 40), random.randrange(1, 40), device=device)
        if random.random() < 0.5:
            _check(t)
        else:
            t["state"] = torch.randn(S, *t["state"].shape[1:], device=device)
            slots = random.sample(range(S), B)
            _check(t, slots=torch.tensor([slot if random.random() < 0.7 else -1 for slot in slots], device=device))


@pytest.mark.parametrize("seed", [None, 3])
def test_only_the_slots_of_a_pool_are_touched(seed: int | None, device: str) -> None:
    t = _inputs(4, device=device)
    t["state"] = torch.randn(6, 6, 5, 7, device=device).half()
    slots = torch.tensor([5, -1, 0, -1], device=device)
    for backend in ("triton", "reference"):
        y, state = _run(t, backend, slots=slots, rounding_seed=seed)
        assert torch.equal(state[1:5], t["state"][1:5])
        assert not (state[[0, 5]] == t["state"][[0, 5]]).all()
        assert not y[[1, 3]].any()
        picked = {k: v[[0, 2]] if k in ("x", "dt", "B", "C") else v for k, v in t.items()}
        alone = _run({**picked, "state": t["state"][[5, 0]]}, backend)
        torch.testing.assert_close(y[[0, 2]], alone[0])
        if seed is None:
            assert torch.equal(state[[5, 0]], alone[1])


def test_slices_of_a_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    t = _inputs(2, device=device)
    expected = _run(t, "triton")
    wide = torch.cat([t[k].flatten(1) for k in ("x", "B", "C", "dt")], 1)
    x, B, C, dt = wide.split([30, 21, 21, 6], dim=1)
    t |= {"x": x.unflatten(1, (6, 5)), "B": B.unflatten(1, (3, 7)), "C": C.unflatten(1, (3, 7)), "dt": dt}
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    for got, want in zip(_run(t, "triton"), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_is_fair_and_keeps_what_is_exact(dtype: torch.dtype, backend: str, device: str) -> None:
    """Over many seeds the mean of each state is its exact value; a single one is a neighbour of it."""
    t = _inputs(1, 2, 1, 16, 64, device=device)
    # all binades, the subnormal numbers of float16 among them
    t["state"] = (t["state"] * torch.logspace(-7, 3, 64, device=device)).to(dtype)
    t["x"] *= 1e-3
    exact = _run({**t, "state": t["state"].float()}, "reference")[1].double()
    least = torch.finfo(dtype).smallest_normal
    spacing = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp(min=least).log2().floor())
    n = 64
    off = torch.stack([(_run(t, backend, rounding_seed=seed)[1].double() - exact) / spacing for seed in range(n)])
    assert float(off.abs().max()) < 1 + 1e-3
    # deviation of a mean of n is at most 0.5 / sqrt(n); of one over all states far less
    assert float(off.mean(0).abs().max()) < 5 * 0.5 / n**0.5
    assert abs(float(off.mean())) < 5 * 0.5 / off.numel() ** 0.5
    # no two numbers of a tile are rounded by the same bits
    unsure = off.flatten(1)[:, off.flatten(1).std(0) > 0.4]
    alike = unsure.T.corrcoef().triu(1).abs().max()
    assert float(alike) < 6.5 / n**0.5
    still = {**t, "x": torch.zeros_like(t["x"]), "A": torch.zeros_like(t["A"])}
    assert torch.equal(_run(still, backend, rounding_seed=1)[1], t["state"])


def test_small_updates_survive_stochastic_rounding_only(device: str) -> None:
    """Forty additions of a tenth of the spacing: four spacings on average, none when rounded to nearest."""
    t = _inputs(1, 1, 1, 32, 16, device=device)
    one = torch.ones(1, device=device)
    spacing = torch.finfo(torch.float16).eps
    t |= {"A": t["A"] * 0, "x": torch.ones_like(t["x"]) * spacing / 10, "B": torch.ones_like(t["B"])}
    t |= {"dt": torch.zeros_like(t["dt"]), "dt_bias": torch.full_like(t["dt_bias"], float(one.expm1().log()))}
    for seeded in (False, True):
        state = torch.ones_like(t["state"]).half()
        with use("triton"):
            for step in range(40):
                selective_state_update(**{**t, "state": state}, rounding_seed=step if seeded else None)  # type: ignore[arg-type]
        gained = float((state.double() - 1).mean()) / spacing
        assert gained == 0 if not seeded else abs(gained - 4) < 0.5


def test_a_seed_on_the_device_rounds_as_its_number_does(device: str) -> None:
    t = _inputs(device=device)
    t["state"] = t["state"].half()
    for backend in ("triton", "reference"):
        a, b, c = (_run(t, backend, rounding_seed=s)[1] for s in (7, torch.tensor([7], device=device), 8))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_needs_gradients_or_is_not_dense_is_left_to_the_reference(device: str) -> None:
    t = _inputs(device=device)
    with pytest.raises(BackendError):
        _run({**t, "x": t["x"].requires_grad_()}, "triton")
    t = _inputs(device=device)
    with use("triton"), pytest.raises(BackendError):
        selective_state_update(**{**t, "state": t["state"].transpose(2, 3).contiguous().transpose(2, 3)})  # type: ignore[arg-type]
