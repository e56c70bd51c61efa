"""The scan in Triton against the recurrence in float64: values and every gradient, however the work is cut up."""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.ssd import ssd

triton = pytest.importorskip("triton")


def _inputs(
    L: int, H: int = 2, G: int = 1, P: int = 5, N: int = 7, B: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    shapes = ((B, L, H, P), (B, L, H), (H,), (B, L, G, N), (B, L, G, N), (H,), (H,), (B, H, P, N))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t = {name: torch.randn(shape).to(device) for name, shape in zip(names, shapes, strict=True)}
    t["A"] = -t["A"].exp()
    return {k: v.to(dtype) if k in ("x", "dt", "B", "C") else v for k, v in t.items()}


def _run(backend: str, inputs: dict[str, Tensor], **rest: object) -> dict[str, Tensor]:
    """y, the final state and the gradient of every input; the reference in float64."""
    t = {k: v.double() if backend == "reference" else v for k, v in inputs.items()}
    t = {k: v.detach().requires_grad_() for k, v in t.items()}
    with use(backend):
        y, state = ssd(**t, **rest)  # type: ignore[arg-type]
    w = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    v = torch.linspace(1, -1, state.numel(), dtype=state.dtype, device=y.device).view_as(state)
    grads = torch.autograd.grad((y * w).sum() + (state * v).sum(), list(t.values()))
    return {"y": y, "state": state, **dict(zip(t, grads, strict=True))}


def _same(inputs: dict[str, Tensor], tolerance: float = 1e-5, **rest: object) -> None:
    """Largest error below `tolerance` of the largest value.

    In float32 a_i - a_j of a chunk loses at most 2^-24 |a| ~ 1e-6 of each weight, sums of a few hundred terms as much.
    Gradients of A, D and dt_bias are sums over all tokens of terms of order one to a hundred that may all but cancel.
    """
    fast, exact = _run("triton", inputs, **rest), _run("reference", inputs, **rest)
    for name, b in exact.items():
        a = fast[name].double()
        assert a.shape == b.shape, name
        slack = 1e-4 if name in ("A", "D", "dt_bias") else 0.0
        assert (a - b).abs().max() <= tolerance * b.abs().max() + slack, name


@pytest.mark.parametrize("L", [1, 15, 16, 17])
def test_short_sequences(L: int) -> None:
    _same(_inputs(L), chunk=16)


@pytest.mark.parametrize(("L", "dtype"), [(33, torch.float32), (63, torch.float16), (65, torch.float16)])
def test_the_chunks_that_a_gpu_takes(L: int, dtype: torch.dtype) -> None:
    _same(_inputs(L, H=1, dtype=dtype), 1e-5 if dtype == torch.float32 else 7 * torch.finfo(dtype).eps, chunk=128)


HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
on_gpu = pytest.mark.gpu


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("L", "H", "G", "P", "N"),
    [
        (19, 3, 1, 5, 7),
        (34, 2, 2, 16, 24),
        pytest.param(1, 8, 4, 64, 128, marks=on_gpu),
        pytest.param(129, 8, 2, 64, 128, marks=on_gpu),
        pytest.param(300, 6, 3, 40, 100, marks=on_gpu),
        pytest.param(2049, 16, 8, 64, 128, marks=on_gpu),  # several segments
        pytest.param(130, 4, 2, 128, 128, marks=on_gpu),  # `_large`
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_forward_and_backward(
    L: int, H: int, G: int, P: int, N: int, packed: bool, dtype: torch.dtype
) -> None:
    t = _inputs(L, H, G, P, N, dtype=dtype)
    starts = (torch.rand(1, L) < 0.1).to(t["x"].device) if packed else None
    # sums of products of numbers rounded to the format, and the results rounded once more
    _same(t, 7 * torch.finfo(dtype).eps, chunk=128, starts=starts)


@on_gpu
def test_float32_on_the_gpu_takes_three_products_of_tf32() -> None:
    _same(_inputs(300, 4, 2, 64, 128), 2e-5, chunk=128)


@pytest.mark.parametrize("chunk", [1, 20, 33])
def test_any_chunk_wanted_gives_the_same(chunk: int) -> None:
    _same(_inputs(35, H=1), chunk=chunk)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (3, 1), (3, 3), (4, 2)], ids=["one", "one group", "group = head", "two"])
@pytest.mark.parametrize("programs", [1, 528], ids=["heads in one program", "a head a program"])
def test_heads_share_groups_in_blocks(H: int, G: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.kernels.triton.ssd.PROGRAMS", programs)
    _same(_inputs(18, H=H, G=G), chunk=16)


def test_heads_shared_unevenly_between_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # one chunk, one group, two programs for its three heads
    monkeypatch.setattr("plait.kernels.triton.ssd.PROGRAMS", 4)
    _same(_inputs(9, H=3), chunk=16)


def test_more_heads_than_a_block_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.kernels.triton.ssd.HEADS", 2)
    _same(_inputs(7, H=3), chunk=16, starts=torch.tensor([[False, False, True, False, False, False, True]]))


@pytest.mark.parametrize("with_starts", [False, True])
def test_segments_walked_at_the_same_time(with_starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.kernels.triton.ssd.SHORTEST_SEGMENT", 32)
    monkeypatch.setattr("plait.kernels.triton.ssd.LONGEST_CHUNK", 32)
    starts = torch.zeros(1, 75, dtype=torch.bool)
    starts[0, [33, 64]] = True
    _same(_inputs(75, H=1), chunk=16, starts=starts if with_starts else None)


def test_starts_padding_and_limits() -> None:
    starts, mask = torch.rand(2, 40) < 0.15, torch.rand(2, 40) < 0.8
    _same(_inputs(40, B=2, H=1), starts=starts, mask=mask, dt_limit=(0.2, 1.5), chunk=16)


@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_a_start_at_the_edge_of_a_chunk(place: int) -> None:
    starts = torch.zeros(1, 32, dtype=torch.bool)
    starts[0, place] = True
    _same(_inputs(32, H=1), starts=starts, chunk=16)


def test_documents_do_not_see_each_other() -> None:
    t = _inputs(37)
    starts = torch.zeros(1, 37, dtype=torch.bool)
    starts[0, 21] = True
    per_token = ("x", "dt", "B", "C")
    second = {k: v[:, 21:] if k in per_token else v for k, v in t.items()} | {"initial_state": None}
    with use("triton"):
        y, state = ssd(**t, starts=starts, chunk=16)  # type: ignore[arg-type]
        alone, alone_state = ssd(**second, chunk=16)  # type: ignore[arg-type]
    torch.testing.assert_close(y[:, 21:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, alone_state, rtol=1e-5, atol=1e-5)


def test_without_options() -> None:
    t = _inputs(20)
    _same({k: t[k] for k in ("x", "dt", "A", "B", "C")}, chunk=16)


@pytest.mark.parametrize("part", ["y", "state"])
def test_a_gradient_of_one_output_alone(part: str) -> None:
    t = {k: v.requires_grad_() for k, v in _inputs(18, H=1).items()}
    grads = []
    for backend in ("triton", "reference"):
        with use(backend):
            out = dict(zip(("y", "state"), ssd(**t, chunk=16), strict=True))  # type: ignore[arg-type]
        # expanded: a gradient with strides of zero
        grads.append(torch.autograd.grad(out[part].sum(), list(t.values()), allow_unused=True, materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_views_of_one_wide_output_are_read_in_place() -> None:
    """x, B and C as the convolution leaves them: columns of one tensor, and of another batch's rows."""
    H, P, G, N, L = 2, 5, 1, 7, 20
    wide = torch.randn(2, L + 3, H * P + 2 * G * N + 4)[:, 3:]
    x, B, C, _ = wide.split((H * P, G * N, G * N, 4), -1)
    t = _inputs(L, H=H, G=G, P=P, N=N, B=2)
    t |= {"x": x.unflatten(-1, (H, P)), "B": B.unflatten(-1, (G, N)), "C": C.unflatten(-1, (G, N))}
    t["dt"] = t["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    t["initial_state"] = t["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    _same(t, chunk=16)


def test_strong_decay_does_not_overflow() -> None:
    t = _inputs(32, H=1)
    t["dt"] += 50
    t["A"] *= 20
    out = _run("triton", t, chunk=32)
    assert all(bool(v.isfinite().all()) for v in out.values())


def test_small_time_steps_keep_their_precision() -> None:
    """softplus(-12) is 6e-6: log(1 + e) in float32 alone would be 1 % off."""
    t = _inputs(20, H=1)
    t["dt"] = t["dt"] * 0.1 - 12 - t["dt_bias"]
    _same({k: v for k, v in t.items() if k != "initial_state"}, chunk=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_keep_float32_states(dtype: torch.dtype) -> None:
    """Each operand of a product rounds once: three roundings to a gradient, of eps / 2 relative to the largest terms.

    Terms add up to less than the largest output times four here, so 3 * 4 / 2 eps; and the output rounds itself.
    """
    t = _inputs(40, dtype=dtype)
    assert _run("triton", t, chunk=16)["state"].dtype == torch.float32
    _same(t, 7 * torch.finfo(dtype).eps, chunk=16)


@pytest.mark.timeout(7200)  # a thousand shapes, forward and backward, in the interpreter
def test_random_shapes(n_shapes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.kernels.triton.ssd.SHORTEST_SEGMENT", 16)
    monkeypatch.setattr("plait.kernels.triton.ssd.LONGEST_CHUNK", 16)
    for trial in range(n_shapes):
        draw = random.Random(trial)
        torch.manual_seed(trial)
        G = draw.choice([1, 1, 2])
        B, L, H = draw.choice([1, 1, 2]), draw.randint(1, 34), G * draw.choice([1, 1, 2])
        t = _inputs(L, H=H, G=G, P=draw.randint(1, 20), N=draw.randint(1, 20), B=B)
        optional = [k for k in ("D", "dt_bias", "initial_state") if draw.random() < 0.3]
        rest = {
            "starts": torch.rand(B, L) < 0.2 if draw.random() < 0.5 else None,
            "mask": torch.rand(B, L) < 0.8 if draw.random() < 0.5 else None,
        }
        monkeypatch.setattr("plait.kernels.triton.ssd.PROGRAMS", draw.choice([1, 4, 528]))
        rest |= {"chunk": 16, "dt_limit": draw.choice([(0.0, float("inf")), (0.1, 1.0)])}
        _same({k: v for k, v in t.items() if k not in optional}, 2e-5, **rest)


HOPPER = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plait.kernels.triton import ssd, ssd_backward, ssd_forward, ssd_states, ssd_steps
from plait.kernels.triton.tuning import DEFAULTS

blocks = ssd.cut("ssd_scan", 1, 8192, 128, 8, 64, 128, 2).blocks() | {"HEADS": ssd.HEADS}
modes = {"BACKWARDS": False, "ADD_UP": False}
for kernel, row in (
    (ssd_steps.steps, {"num_warps": 4}),
    (ssd_steps.step_gradients, {"num_warps": 4}),
    (ssd_states.walk, DEFAULTS["ssd_walk"]),
    (ssd_forward.scan, DEFAULTS["ssd_scan"]),
    (ssd_backward.gradients, DEFAULTS["ssd_gradients"]),
):
    names = kernel.arg_names
    ones = {n: 1 for n in names if re.fullmatch(r"\\w+_[pn]", n)}
    fixed = {n: v for n, v in (blocks | modes | ones).items() if n in names}
    low = {"x", "B", "C", "v", "K", "y", "dx", "dy", "dB", "dC", "raw", "d_raw", "states", "state_gradients", "each"}
    types = {"starts": "*i1", "mask": "*i1", "begun": "*i32", "low": "fp32", "high": "fp32"}
    types |= dict.fromkeys(low, "*bf16")
    types |= dict.fromkeys(("A", "D", "bias", "dt", "a", "d_dt", "d_a", "dD", "dA", "d_bias"), "*fp32")
    types |= dict.fromkeys(("first", "totals", "kept", "last"), "*fp32")
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}
    even = [n for n in names if signature[n][0] == "*" or re.fullmatch(r"\\w+_[blgh]|H|L|segment|n_padded", n)]
    source = ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in fixed.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    options = {k: v for k, v in row.items() if k != "Q"}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.fn.__name__, done.metadata.shared, "wgmma" in done.asm["ptx"])
"""


def test_the_kernels_compile_for_hopper_and_fit_its_shared_memory() -> None:
    """No GPU is needed to compile; the interpreter knows neither layouts nor memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", HOPPER], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {name: (int(shared), wgmma) for name, shared, wgmma in map(str.split, done.stdout.splitlines())}
    assert rows.keys() == {"steps", "step_gradients", "walk", "scan", "gradients"}
    # 227 KB a multiprocessor and 1 KB a program: two of `walk` and `scan` at a time, one of `gradients`
    assert all(rows[name][0] <= limit for name, limit in (("walk", 112e3), ("scan", 112e3), ("gradients", 200e3)))
    assert all(rows[name][1] == "True" for name in ("walk", "scan", "gradients"))
