"""Linear layers of three products: the published packages' numbers, what is kept, and chance that repeats itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.ops.fp8 import dequantize_fp8, quantize_fp8
from plait.precision import three
from plait.precision.format import HIGH, LinearFormat, TensorFormat
from plait.precision.linear import Linear
from plait.precision.moment import Moment
from plait.precision.operand import product, round_to
from plait.precision.papers import MX4, MX8, NV4, TENSORWISE, TILEWISE
from plait.precision.ternary import BITLINEAR
from plait.precision.three import Call, three_gemms

FORMATS = {"fp8": TENSORWISE, "fp8-block": TILEWISE, "mxfp8": MX8, "mxfp4": MX4, "nvfp4": NV4, "ternary": BITLINEAR}


def nearest(form: LinearFormat) -> LinearFormat:
    """The same without chance."""
    pairs = {
        name: tuple(None if f is None else replace(f, rounding="nearest") for f in getattr(form, name))
        for name in ("fprop", "dgrad", "wgrad")
    }
    return replace(form, **pairs)  # type: ignore[arg-type]


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def passes(x: Tensor, w: Tensor, dy: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = three_gemms(x, w, call)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return y.detach(), dx, dw


@pytest.mark.parametrize("case", ["a", "b"])
def test_fp8_equals_the_published_linear_layer(shared: Path, case: str) -> None:
    d = load_file(shared / "vectors" / "fp8_linear.safetensors")
    found = passes(d[f"{case}.x"], d[f"{case}.w"], d[f"{case}.dy"], Call(TENSORWISE))
    for name, ours in zip(("y", "dx", "dw"), found, strict=True):
        assert distance(ours, d[f"{case}.te.{name}"]) < 3e-7, name


@pytest.mark.parametrize("case", ["a", "b"])
def test_nvfp4_equals_the_published_linear_layer(shared: Path, case: str) -> None:
    d = load_file(shared / "vectors" / "nvfp4_linear.safetensors")
    x, w, dy = (d[f"{case}.{name}"] for name in ("x", "w", "dy"))
    form = nearest(NV4)
    y, dx, _ = passes(x.float(), w, dy.float(), Call(form))
    assert distance(y, d[f"{case}.te.y"]) < 3e-7 and distance(dx, d[f"{case}.te.dx"]) < 3e-7
    # rotated bfloat16 numbers are rounded to bfloat16 before they are quantised: these operands are made of those
    a, b = round_to(form.wgrad[0], dy, turned=True), round_to(form.wgrad[1], x, turned=True, packed=True)
    assert distance(product(a, b, torch.float32), d[f"{case}.te.dw"]) < 3e-7
    for ours, name in zip(passes(x, w, dy, Call(form)), ("y", "dx", "dw"), strict=True):
        assert distance(ours, d[f"{case}.te.{name}"]) < 2.5e-3, "bfloat16 rounds the products, and nothing else"


def test_ternary_equals_the_published_linear_layer(shared: Path) -> None:
    d = load_file(shared / "vectors" / "bitnet.safetensors")
    found = passes(d["linear.a.x"], d["linear.a.w"], d["linear.a.dy"], Call(BITLINEAR))
    for name, ours in zip(("y", "dx", "dw"), found, strict=True):
        assert distance(ours, d[f"linear.a.{name}"]) < 3e-7, name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [(1,), (3, 7), (2, 64)])
def test_all_formats_take_any_number_of_tokens(name: str, tokens: tuple[int, ...]) -> None:
    """Results are near the exact ones, by how many bits there are; a block of zeros at the end changes nothing."""
    x, w, dy = torch.randn(*tokens, 128), torch.randn(256, 128), torch.randn(*tokens, 256)
    y, dx, dw = passes(x, w, dy, Call(FORMATS[name]))
    most = {"fp8": 0.1, "fp8-block": 0.06, "mxfp8": 0.06, "ternary": 0.7}.get(name, 0.4)
    exact = dy.flatten(0, -2).t() @ x.flatten(0, -2)
    for ours, theirs in ((y, x @ w.t()), (dx, dy @ w), (dw, exact)):
        assert 1e-4 < distance(ours, theirs) < most or (name == "ternary" and ours is dw)
    assert dw.dtype == w.dtype and y.shape == (*tokens, 256) and dx.shape == x.shape


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_products_of_codes_round_once(name: str) -> None:
    """The bfloat16 GEMM of codes gives the float32 result rounded to bfloat16, not a sum of roundings."""
    x, w, dy = torch.randn(96, 128).bfloat16(), torch.randn(256, 128), torch.randn(96, 256).bfloat16()
    call = Call(nearest(FORMATS[name]))
    high = passes(x.float(), w, dy.float(), call)
    for low, exact, where in zip(passes(x, w, dy, call), high, ("y", "dx", "dw"), strict=True):
        if where == "dw" and call.form.wgrad[1] is not None and call.form.wgrad[1].hadamard:
            continue  # the rotation itself is rounded to bfloat16
        if name == "ternary" and where != "y":
            continue  # gradients meet numbers, not codes
        assert bool(((low.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()), where


def test_a_scale_for_each_row_is_of_the_operands_own_rows() -> None:
    row = TensorFormat(element="e4m3", scale="row")
    x, w, dy = torch.randn(21, 40), torch.randn(30, 40) * torch.logspace(-3, 3, 30)[:, None], torch.randn(21, 30)
    form = LinearFormat(fprop=(row, row), dgrad=(row, row), wgrad=(row, row))

    def rounded(t: Tensor) -> Tensor:
        return dequantize_fp8(*quantize_fp8(t, block="row")).double()

    y, dx, dw = passes(x, w, dy, Call(form))
    assert distance(y, rounded(x) @ rounded(w).t()) < 1e-6
    assert distance(dx, rounded(dy) @ rounded(w.t().contiguous()).t()) < 1e-6
    assert distance(dw, rounded(dy.t().contiguous()) @ rounded(x.t().contiguous()).t()) < 1e-6


def kept_bytes(form: LinearFormat, tokens: int, d_in: int, d_out: int) -> int:
    """Bytes that the backward pass keeps besides the weight itself."""
    layer = Linear(d_in, d_out, number_format=form)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(tokens, d_in).bfloat16().requires_grad_()
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr():
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    total = sum(found.values())
    y.sum().backward()
    assert layer.weight.grad is not None
    return total


def test_only_the_codes_of_the_input_are_kept() -> None:
    T, K, N = 512, 256, 384
    plain = kept_bytes(LinearFormat(), T, K, N)
    assert plain == 2 * T * K + 2 * N * K, "bfloat16 keeps the input, and the weight as it was cast"
    scales = {"fp8": 4, "fp8-block": T * K // 128 * 4, "mxfp8": T * K // 32, "mxfp4": T * K // 32}
    scales |= {"nvfp4": T * K // 16 + 4, "ternary": 4 * T}
    for name, form in FORMATS.items():
        codes = T * K // 2 if "fp4" in name else T * K
        assert kept_bytes(form, T, K, N) == codes + scales[name], name


def test_high_rows_are_computed_as_if_alone() -> None:
    parts = (("z", 24), ("x", 40), ("dt", 8))
    layer = Linear(32, 72, number_format=BITLINEAR, parts=parts, bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight[24:64] *= 10
    x, dy = torch.randn(5, 3, 32, requires_grad=True), torch.randn(5, 3, 72)
    y = layer(x)
    y.backward(dy)
    bounds, each = (0, 24, 64, 72), []
    grads = torch.zeros_like(x)
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        form = LinearFormat() if i == 2 else BITLINEAR
        out, dx, dw = passes(x.detach(), layer.weight.detach()[a:b], dy[..., a:b], Call(form))
        each.append(out + layer.bias[a:b])  # type: ignore[index]
        grads += dx
        torch.testing.assert_close(layer.weight.grad[a:b], dw)  # type: ignore[index]
    torch.testing.assert_close(y, torch.cat(each, -1))
    torch.testing.assert_close(x.grad, grads)


def test_chance_follows_from_seed_draw_part_name_and_operand_alone() -> None:
    x, w, dy = torch.randn(64, 64), torch.randn(64, 64), torch.randn(64, 64)
    call = Call(NV4, name="blocks.0.mixer.up_proj", seed=1, draw=5, part=0)
    first, again = passes(x, w, dy, call), passes(x, w, dy, call)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (replace(call, seed=2), replace(call, draw=6), replace(call, part=1), replace(call, name="b")):
        y, dx, dw = passes(x, w, dy, other)
        assert torch.equal(y, first[0]) and not torch.equal(dx, first[1]) and not torch.equal(dw, first[2])


def test_stochastic_gradients_are_right_on_average() -> None:
    x, w, dy = torch.randn(32, 32), torch.randn(32, 32), torch.rand(32, 32) * 2 - 1
    dy[:, ::16] = 1.0  # so that block scales are not rounded, and nothing saturates
    exact, tries = passes(x, w, dy, Call(nearest(NV4))), 200
    each = torch.stack([passes(x, w, dy, Call(NV4, draw=i))[1] for i in range(tries)])
    w_hat = passes(torch.eye(32), w, torch.zeros(32, 32), Call(replace(NV4, fprop=(None, NV4.fprop[1]))))[0].t()
    z = (each.mean(0) - dy @ w_hat) / (each.std(0) / tries**0.5)
    assert 0.9 < float(z.square().mean()) < 1.15 and float(z.abs().max()) < 4.5
    biased = (exact[1] - dy @ w_hat) / (each.std(0) / tries**0.5)
    assert float(biased.square().mean()) > 20, "nearest rounding is not"


def test_recomputed_layers_draw_the_same_numbers() -> None:
    """With chance in the forward product too, a layer that is run again must see what it saw."""
    chance = replace(NV4, fprop=(replace(NV4.fprop[0], rounding="stochastic"), NV4.fprop[1]))  # type: ignore[type-var]
    layer = Linear(64, 32, number_format=chance)
    torch.nn.init.normal_(layer.weight)
    layer.name, layer.moment = "blocks.3.mixer.up_proj", Moment(seed=3, draw=7, part=1)
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 32)
    found = []
    for again in (False, True):
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append((y, *torch.autograd.grad(y, (x, layer.weight), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_after_the_late_switch_another_format_computes() -> None:
    layer = Linear(64, 32, number_format=NV4)
    torch.nn.init.normal_(layer.weight)
    layer.late_format = replace(NV4, fprop=(None, None))
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 32)
    before = torch.autograd.grad(layer(x), x, dy)[0]
    assert distance(layer(x), x @ layer.weight.t()) > 0.05
    layer.moment.is_late = True
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.t())
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], before), "backward it computes as before"


def test_without_a_gradient_nothing_is_kept_and_few_rows_are_served() -> None:
    layer = Linear(64, 32, number_format=TENSORWISE)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.requires_grad_()))
        assert not layer(x).requires_grad


class Between(torch.nn.Module):
    """A layer between two elementwise functions."""

    def __init__(self, form: LinearFormat = NV4) -> None:
        super().__init__()
        self.layer = Linear(64, 32, number_format=form, parts=(("x", 24), ("dt", 8)))
        torch.nn.init.normal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.layer(torch.nn.functional.silu(x)))


def test_the_compiler_makes_no_program_per_step() -> None:
    module, graphs = Between(), []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled, x = torch.compile(module, backend=count, dynamic=True), torch.randn(4, 16, 64, requires_grad=True)
    for draw in range(4):
        module.layer.moment.draw, module.layer.moment.part = draw, draw % 2
        module.layer.moment.share = draw / 3
        y = compiled(x)
        assert torch.equal(y, module(x))
        y.sum().backward()
    assert len(graphs) == 2, "what lies before and after the layer, once"


def test_compiled_layers_of_one_kind_compute_each_in_its_own_format() -> None:
    """Blocks share what is compiled; that the first one computes in bfloat16 says nothing of the others."""
    x = torch.randn(2, 16, 64)
    for form in (HIGH, NV4, TENSORWISE, BITLINEAR, HIGH, replace(NV4, dgrad=(None, None))):
        module = Between(form)
        module.compile(dynamic=True, backend="eager")
        assert torch.equal(module(x), module.forward(x)), form
        module.layer.late_format = HIGH
        module.layer.moment.is_late = True
        assert torch.equal(module(x), module.forward(x)), "late"


@pytest.mark.parametrize("name", ["ternary", "nvfp4"])
def test_a_gradual_weight_lies_between_the_plain_and_the_rounded_one(name: str) -> None:
    """In float64 by hand: y = x_q ((1 - s) W + s Q(W))^T and the data gradient with the same matrix."""
    form = nearest(FORMATS[name])
    x, w, dy = torch.randn(32, 64), torch.randn(48, 64), torch.randn(32, 48)
    # the same matrices in all products, rounded as the layer does it
    wf, wd = (round_to(f, w) for f in (form.fprop[1], form.dgrad[1]))
    values = [(v if d is None else v * d).double() for v, d in (one.opened(torch.float32) for one in (wf, wd))]
    for share in (0.0, 0.25, 1.0):
        call = replace(Call(form), share=share)
        y, dx, _ = passes(x, w, dy, call)
        mixed = [(1 - share) * w.double() + share * v for v in values]
        xv, xd = round_to(form.fprop[0], x).opened(torch.float32)
        dv, dd = round_to(form.dgrad[0], dy).opened(torch.float32)
        x_q = xv.double() * (1.0 if xd is None else xd.double())
        dy_q = dv.double() * (1.0 if dd is None else dd.double())
        assert distance(y, x_q @ mixed[0].t()) < 4e-7, share
        assert distance(dx, dy_q @ mixed[1]) < 4e-7, share


def test_a_gradual_layer_ends_as_the_rounded_one_bit_for_bit() -> None:
    x, w, dy = torch.randn(5, 64), torch.randn(24, 64), torch.randn(5, 24)
    call = Call(BITLINEAR, parts=(8, 12), n_high=4)
    for a, b in zip(passes(x, w, dy, call), passes(x, w, dy, replace(call, share=1.0)), strict=True):
        assert torch.equal(a, b)
    y, dx, dw = passes(x, w, dy, replace(call, share=0.5))
    whole = passes(x, w, dy, call)
    # rows that stay high, and the weight gradient, do not know of it
    assert torch.equal(y[:, 20:], whole[0][:, 20:]) and torch.equal(dw, whole[2]) and not torch.equal(dx, whole[1])


@pytest.mark.parametrize("name", FORMATS)
def test_projections_of_one_input_share_its_codes(name: str) -> None:
    T, K, N = 128, 128, 256
    form, w, dy = FORMATS[name], torch.randn(3, N, K), torch.randn(3, T, N).bfloat16()
    x, kept = torch.randn(T, K).bfloat16(), {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() != w.untyped_storage().data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def grads(shared: bool) -> list[Tensor]:
        ws = list(w.requires_grad_()) if shared else [one.clone().requires_grad_() for one in w.detach()]
        ys = [three_gemms(x if shared else x.clone(), one, Call(form, name=str(i))) for i, one in enumerate(ws)]
        return [*ys, *torch.autograd.grad(ys, ws, list(dy))]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        together = grads(shared=True)
    assert sum(kept.values()) == kept_bytes(form, T, K, N), "as much as a single layer keeps"
    assert all(torch.equal(a, b) for a, b in zip(together, grads(shared=False), strict=True))


def test_what_was_shared_is_forgotten_when_its_input_changes_or_ends() -> None:
    x, w = torch.randn(32, 64), torch.randn(48, 64)
    first = three_gemms(x, w, Call(NV4))
    x.mul_(-1)
    assert torch.equal(three_gemms(x, w, Call(NV4)), -first)
    with torch.inference_mode():
        y = torch.randn(32, 64)
        second = three_gemms(y, w, Call(NV4))
        assert torch.equal(three_gemms(y.neg_(), w, Call(NV4)), -second)
    three_gemms(x, w, Call(NV4))
    assert three._latest
    del x
    assert not three._latest, "nothing of a finished forward pass stays in memory"


def test_layers_that_read_one_input_by_chance_do_not_share_it() -> None:
    chance = replace(NV4, fprop=(replace(NV4.fprop[0], rounding="stochastic"), NV4.fprop[1]))  # type: ignore[type-var]
    x, w = torch.randn(32, 64), torch.randn(48, 64)
    assert not torch.equal(three_gemms(x, w, Call(chance, name="q")), three_gemms(x, w, Call(chance, name="k")))


def test_weights_are_rounded_by_chance_alike_in_all_parts_of_a_step_and_tokens_are_not() -> None:
    """Parts are spread over processes: their copies of a weight must agree, while the tokens of each are its own."""
    x, w = torch.randn(32, 64), torch.randn(48, 64)
    form = TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3", rounding="stochastic")
    for pair, same in (((None, form), True), ((form, None), False)):
        a, b = (three_gemms(x, w, Call(LinearFormat(fprop=pair), part=part)) for part in (0, 1))
        assert torch.equal(a, b) == same


@pytest.mark.parametrize("name", FORMATS)
def test_no_tokens_give_no_outputs_and_no_gradient(name: str) -> None:
    w = torch.randn(256, 128)
    y, dx, dw = passes(torch.empty(2, 0, 128), w, torch.empty(2, 0, 256), Call(FORMATS[name]))
    assert y.shape == (2, 0, 256) and dx.shape == (2, 0, 128) and torch.equal(dw, torch.zeros_like(w))
