"""Products on tensor cores: what scaled_mm is handed, checked by torch's own rules and by reading it back."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.ops import gemm
from plait.precision.format import LinearFormat, TensorFormat
from plait.precision.operand import is_native, product, round_to
from plait.precision.papers import MX8, NV4, TENSORWISE, TILEWISE
from plait.precision.three import Call, three_gemms

CPU = torch.device("cpu")
ROW = TensorFormat(element="e4m3", scale="row")
ROWWISE = LinearFormat(fprop=(ROW, ROW), dgrad=(ROW, ROW), wgrad=(ROW, ROW))
CASES = {"tensor": (TENSORWISE, (9, 0)), "row": (ROWWISE, (9, 0)), "tiles": (TILEWISE, (9, 0))}
CASES |= {"mx": (MX8, (10, 0)), "nvfp4": (NV4, (10, 3))}


@pytest.fixture(params=CASES)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LinearFormat]:
    """A format of each kind, on a device that has tensor cores for it."""
    found, generation = CASES[request.param]
    monkeypatch.setattr(gemm, "capability", lambda device: generation)
    yield found


def untiled(flat: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in the order of tensor cores, one by one from the published formula of their offset."""
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tiles = -(-columns // 4)
    at = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return flat.view(torch.uint8)[at].view(flat.dtype)


def read(codes: Tensor, scales: list[Tensor], kinds: list[object]) -> Tensor:
    """The numbers (R, C) in float64 that an operand of scaled_mm stands for."""
    kind = getattr(kinds[0], "name", "")
    if codes.dtype == torch.float4_e2m1fn_x2:
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        bits = codes.view(torch.uint8)
        nibbles = torch.stack([bits & 15, bits >> 4], -1).flatten(-2).long()
        x = table[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    else:
        x = codes.float()
    R, C = x.shape
    if kind == "TensorWise":
        return x.double() * scales[0].double()
    if kind == "RowWise":
        return x.double() * scales[0].double().reshape(R, 1)
    if kind == "BlockWise1x128":
        assert scales[0].stride() == (1, R)
        return x.double() * scales[0].double().repeat_interleave(128, 1)
    if kind == "BlockWise128x128":
        assert scales[0].stride() == (1, scales[0].shape[0]) and scales[0].shape[0] % 4 == 0
        s = scales[0].t()[:, : C // 128]
        return x.double() * s.double().repeat_interleave(128, 1).repeat_interleave(128, 0)
    size = 32 if kind == "BlockWise1x32" else 16
    x = x.double() * untiled(scales[0], R, C // size).double().repeat_interleave(size, 1)
    return x if size == 32 else x * scales[1].double()


def stands_in(a: Tensor, b: Tensor, sa, ka, sb, kb, *, swizzle_a, swizzle_b, output_dtype, use_fast_accum) -> Tensor:  # type: ignore[no-untyped-def]
    """What scaled_mm computes, read from its arguments' documented layouts."""
    assert [s.name for s in swizzle_a] == [s.name for s in swizzle_b]
    return (read(a, sa, ka) @ read(b.t(), sb, kb).t()).to(output_dtype)


def test_what_tensor_cores_are_handed_is_what_is_emulated(form: LinearFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def spy(*args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        seen.append(kwargs["use_fast_accum"])
        return stands_in(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", spy, raising=False)
    x, w, dy = torch.randn(256, 384).bfloat16(), torch.randn(640, 384), torch.randn(256, 640).bfloat16()
    call = Call(form, name="a", seed=3, draw=4)
    found = []
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setattr(gemm, "capability", lambda device: (0, 0))
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = three_gemms(xx, ww, call)
        found.append((y.detach(), *torch.autograd.grad(y, (xx, ww), dy)))
    assert seen == [True, False, False], "three products, sums in fewer bits only forward"
    for native, emulated in zip(*found, strict=True):
        off = (native.float() - emulated.float()).abs() > emulated.float().abs() * 2**-7 + 1e-4 * emulated.float().std()
        assert not bool(off.any())


def test_torch_accepts_the_layouts(form: LinearFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules that torch checks before it computes, on a GPU that is only pretended."""
    scaled_mm, seen = F.scaled_mm, []  # type: ignore[attr-defined]

    def on_gpu(*args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        def pretended(t: object) -> object:
            if isinstance(t, list):
                return [pretended(item) for item in t]
            return (
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t
            )

        with FakeTensorMode():
            y = scaled_mm(*map(pretended, args), **kwargs)
        seen.append(y.shape)
        return torch.zeros(y.shape, dtype=y.dtype)

    monkeypatch.setattr(F, "scaled_mm", on_gpu)
    x, w = torch.randn(256, 384).bfloat16().requires_grad_(), torch.randn(640, 384, requires_grad=True)
    three_gemms(x, w, Call(form)).sum().backward()
    assert seen == [(256, 640), (256, 384), (640, 384)]


@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_torchs_own_product_on_the_cpu_agrees(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, generation = CASES[kind]
    x, w = torch.randn(48, 64).bfloat16(), torch.randn(96, 64)
    a, b = round_to(form.fprop[0], x, packed=True), round_to(form.fprop[1], w, packed=True)
    emulated = product(a, b, torch.float32)
    monkeypatch.setattr(gemm, "capability", lambda device: generation)
    torch.testing.assert_close(product(a, b, torch.bfloat16).float(), emulated, rtol=2**-8, atol=1e-5)


def test_sizes_that_tensor_cores_do_not_take_are_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "capability", lambda device: (9, 0))
    monkeypatch.setattr(F, "scaled_mm", None, raising=False)
    x, w = torch.randn(7, 40).bfloat16().requires_grad_(), torch.randn(30, 40, requires_grad=True)
    three_gemms(x, w, Call(TENSORWISE)).sum().backward()
    assert w.grad is not None and x.grad is not None


def test_which_device_has_what() -> None:
    table = {
        (8, 0): set(),
        (8, 9): {"tensor"},
        (9, 0): {"tensor", "row", "tiles"},
        (10, 0): {"tensor", "row", "mx", "nvfp4"},
        (12, 0): {"tensor", "row"},
    }
    for generation, kinds in table.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "capability", lambda device, here=generation: here)
            assert {kind for kind, (form, _) in CASES.items() if is_native(form.fprop, CPU)} == kinds
    assert not is_native(TENSORWISE.fprop, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CASES)
def test_tensor_cores_compute_what_is_emulated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = CASES[kind][0]
    if not is_native(form.fprop, torch.device("cuda")):
        pytest.skip("no such tensor cores here")
    torch.manual_seed(0)
    x, w = torch.randn(512, 1024, device="cuda").bfloat16(), torch.randn(768, 1024, device="cuda")
    dy, call, found = torch.randn(512, 768, device="cuda").bfloat16(), Call(form, name="a"), []
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setattr(gemm, "capability", lambda device: (0, 0))
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = three_gemms(xx, ww, call)
        found.append((y.detach(), *torch.autograd.grad(y, (xx, ww), dy)))
    for native, emulated in zip(*found, strict=True):
        assert float((native.float() - emulated.float()).norm() / emulated.float().norm()) < 4e-3
