"""The state space: chunked scan = recurrence = step form, values and every gradient, in float64 and float32."""

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.ssd import selective_state_update, ssd


def _inputs(L: int, H: int = 6, G: int = 3, P: int = 5, N: int = 7, B: int = 2, dtype: torch.dtype = torch.double):
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    shapes = ((B, L, H, P), (B, L, H), (H,), (B, L, G, N), (B, L, G, N), (H,), (H,), (B, H, P, N))
    t = {name: torch.randn(shape, dtype=dtype) for name, shape in zip(names, shapes, strict=True)}
    t["A"] = -t["A"].exp()
    return {name: value.requires_grad_() for name, value in t.items()}


def _both(inputs: dict[str, Tensor], **rest: object) -> list[tuple[Tensor, ...]]:
    """Outputs, final state and gradients of every input, by the chunked scan and by the recurrence."""
    out = []
    for backend in ("chunked", "reference"):
        with use(backend):
            y, state = ssd(**inputs, **rest)  # type: ignore[arg-type]
        w = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        v = torch.linspace(1, -1, state.numel(), dtype=state.dtype).view_as(state)
        grads = torch.autograd.grad((y * w).sum() + (state * v).sum(), list(inputs.values()))
        out.append((y, state, *grads))
    return out


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("L", [1, 15, 16, 17, 63])
def test_chunked_scan_equals_the_recurrence(L: int, chunk: int) -> None:
    chunked, naive = _both(_inputs(L), chunk=chunk)
    for a, b in zip(chunked, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 1), (4, 4)], ids=["one head", "one group", "group = head"])
def test_heads_share_groups_in_blocks(H: int, G: int) -> None:
    chunked, naive = _both(_inputs(21, H=H, G=G), chunk=8)
    for a, b in zip(chunked, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_starts_padding_and_limits_agree_too(chunk: int) -> None:
    starts, mask = torch.rand(2, 40) < 0.15, torch.rand(2, 40) < 0.8
    chunked, naive = _both(_inputs(40), starts=starts, mask=mask, dt_limit=(0.2, 1.5), chunk=chunk)
    for a, b in zip(chunked, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_recurrence_is_the_papers_matrix() -> None:
    """Equation 3 of the paper: y = M x with M_ts = C_t^T (prod of decays) B_s dt_s, plus D on the diagonal."""
    t = _inputs(9, H=1, G=1, P=1, B=1)
    dt = torch.nn.functional.softplus(t["dt"] + t["dt_bias"])[0, :, 0]
    M = torch.zeros(9, 9, dtype=torch.double)
    for i in range(9):
        for j in range(i + 1):
            M[i, j] = (t["C"][0, i, 0] @ t["B"][0, j, 0]) * (t["A"][0] * dt[j + 1 : i + 1].sum()).exp() * dt[j]
    exact = M @ t["x"][0, :, 0, 0] + t["D"][0] * t["x"][0, :, 0, 0]
    for backend in ("chunked", "reference"):
        with use(backend):
            y, _ = ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], D=t["D"], dt_bias=t["dt_bias"], chunk=4)
        torch.testing.assert_close(y[0, :, 0, 0], exact)


def test_steps_equal_the_scan_and_pieces_equal_the_whole() -> None:
    t = {k: v.detach() for k, v in _inputs(30).items()}
    y, last = ssd(**t, chunk=8)  # type: ignore[arg-type]
    state = t["initial_state"].clone()
    per_token = [t[k] for k in ("x", "dt", "B", "C")]
    fixed = {k: t[k] for k in ("D", "dt_bias")}
    head = ssd(
        *(v[:, :11] for v in per_token[:2]), t["A"], *(v[:, :11] for v in per_token[2:]), initial_state=state, **fixed
    )
    state, out = head[1], [head[0]]
    for i in range(11, 30):
        x, dt, B, C = (v[:, i] for v in per_token)
        out.append(selective_state_update(state, x, dt, t["A"], B, C, **fixed)[:, None])
    torch.testing.assert_close(torch.cat(out, 1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_strong_decay_does_not_overflow() -> None:
    """exp of a positive sum would be infinite above the diagonal; it must not reach values or gradients."""
    t = _inputs(64, dtype=torch.float32)
    with torch.no_grad():
        t["dt"] += 50
        t["A"] *= 20
    y, state = ssd(**t, chunk=64)  # type: ignore[arg-type]
    grads = torch.autograd.grad(y.sum() + state.sum(), list(t.values()))
    assert all(bool(g.isfinite().all()) for g in (y, state, *grads))


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    t = {k: v.detach() for k, v in _inputs(50, dtype=torch.float32).items()}
    low = {k: v.bfloat16() if k in ("x", "dt", "B", "C") else v for k, v in t.items()}
    y, state = ssd(**low, chunk=16)  # type: ignore[arg-type]
    exact_y, exact_state = ssd(**{k: v.double() for k, v in low.items()}, chunk=16)  # type: ignore[arg-type]
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # products of a chunk in bfloat16: three roundings of 2^-9 relative to the largest terms
    scale = exact_y.abs().max()
    assert (y.double() - exact_y).abs().max() < 6 * 2**-9 * scale
    assert (state.double() - exact_state).abs().max() < 4 * 2**-9 * exact_state.abs().max()


def test_groups_must_divide_heads() -> None:
    t = _inputs(4, H=4, G=3)
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd(**t)  # type: ignore[arg-type]
