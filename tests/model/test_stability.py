"""Options for training at high rates: their formulas, both ways of decoding, saving, and what cannot know them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.model.sizes import METHODS, STABLE, with_method
from torch import Tensor

from plait.config import ConfigError
from plait.formats.checkpoint import load, save
from plait.formats.error import CheckpointError
from plait.kernels.native import library
from plait.model import sigma
from plait.model.config import ModelConfig
from plait.model.hybrid import Block, Hybrid, build
from plait.model.sigma import SigmaLinear
from plait.model.static import StaticCache
from plait.model.step import step

each = pytest.mark.parametrize("method", METHODS)


def stirred(method: str, pattern: str = "M-*-ME") -> Hybrid:
    """A float32 model with nothing at a default value."""
    model = build(with_method(method, pattern), "fp32", seed=1)
    with torch.no_grad():
        for name, t in model.named_parameters():
            if t.dim() <= 1 and not name.endswith(("A_log", "dt_bias")):
                t.add_(torch.randn(t.shape) * 0.2)
    return model


def block_of(**attention: object) -> tuple[Block, Tensor, Callable[[], Tensor]]:
    """A model of one attention layer without rotation, 20 wide, 4 heads of 6 on 2; an input; its output."""
    sizes = {"vocab_size": 9, "d_model": 20, "init_std": 0.5}
    settings = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, **attention}
    model = build(ModelConfig.from_pattern("*", attention=settings, **sizes), "fp32")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape) + 0.5
    block, ids = model.blocks[0], torch.randint(0, 9, (2, 7))
    assert isinstance(block, Block)
    x = model.embed(ids).detach()
    return block, x, lambda: model.hidden(ids, keeps_all=True)[1][1]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def by_hand(block: Block, x: Tensor, *, norms: str = "", **soft: float) -> Tensor:
    """x + mixer(norm(x)) in float64, with loops where the model has products."""
    m, x = block.mixer.double(), x.double()
    y = x if block.norm is None else rms(x, block.norm.weight)
    q, k, v = ((y @ p.weight.double().T).unflatten(-1, (-1, 6)) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = (rms(q, m.q_norm.weight), rms(k, m.k_norm.weight)) if "qk" in norms else (q, k)
    v = rms(v, m.v_norm.weight) if "v" in norms else v
    out = torch.zeros_like(q)
    for b, t, h in [(b, t, h) for b in range(2) for t in range(7) for h in range(4)]:
        z = torch.stack([q[b, t, h] @ k[b, s, h // 2] for s in range(t + 1)]) / 6**0.5 * soft.get("temp", 1.0)
        if "cap" in soft:
            z = soft["cap"] * (z / soft["cap"]).tanh()
        p = z.exp() / z.exp().sum()
        if "high" in soft:
            p = ((soft["high"] - soft["low"]) * p + soft["low"]).clamp(0, 1)
        out[b, t, h] = sum(p[s] * v[b, s, h // 2] for s in range(t + 1))
    y = out.flatten(-2) @ m.o_proj.weight.double().T
    y = y if block.post_norm is None else rms(y, block.post_norm.weight)
    return x + (y if block.scale is None else y * block.scale.double())


CASES = {
    "baseline": ({}, {}),
    "soft_temp": ({"soft_temp": 0.5}, {"temp": 0.5}),
    "soft_cap": ({"soft_cap": 0.7}, {"cap": 0.7}),
    "soft_clip": ({"soft_clip": (1.1, -0.1)}, {"high": 1.1, "low": -0.1}),
    "qk_norm_cap": ({"qk_norm": True, "soft_cap": 0.7, "soft_temp": 3.0}, {"norms": "qk", "cap": 0.7, "temp": 3.0}),
    "qkv_norm": ({"qk_norm": True, "v_norm": True, "pre_norm": False}, {"norms": "qkv"}),
    "qk_fc_norm": ({"qk_norm": True, "post_norm": True}, {"norms": "qk"}),
    "layer_scale": ({"layer_scale": 0.3, "post_norm": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_formula_written_out(case: str) -> None:
    settings, by = CASES[case]
    block, x, run = block_of(**settings)
    got = run().detach().double()
    torch.testing.assert_close(got, by_hand(block, x, **by), rtol=1e-5, atol=1e-5)


def test_each_option_changes_what_a_model_computes() -> None:
    ids = torch.randint(0, 37, (1, 9))
    seen = {method: model(ids).logits for method in METHODS if (model := stirred(method))}
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (seen[one] - seen[other]).abs().max() > 1e-4, (one, other)


@each
def test_packed_documents_equal_documents_alone(method: str) -> None:
    model, ids = stirred(method), torch.randint(0, 37, (1, 21))
    starts = torch.zeros(1, 21, dtype=torch.bool)
    starts[0, [0, 5, 6]] = True
    packed = model(ids, starts=starts).logits
    alone = torch.cat([model(part).logits for part in ids.split([5, 1, 15], 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@each
def test_every_parameter_learns(method: str) -> None:
    model, ids = stirred(method), torch.randint(0, 37, (2, 17))
    starts = torch.zeros(2, 17, dtype=torch.bool)
    starts[:, 0] = starts[1, 4] = True
    loss = model(ids, labels=ids, starts=starts).loss
    assert loss is not None
    loss.backward()
    still = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    # a token may be in no batch, an expert chosen by none
    assert [name for name in still if "experts" not in name] == []


@each
def test_a_cache_of_fixed_size_decodes_the_same(method: str) -> None:
    model, ids = stirred(method), torch.randint(0, 37, (2, 12))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.cache(2)
        model(ids[:, :7], cache=cache)
        fixed = StaticCache(model.config, 2, 20, device=model.device, dtype=torch.float32)
        for t in fixed.tensors().values():
            # nobody has written there yet
            if t.is_floating_point():
                t.fill_(float("nan"))
        fixed.take(cache)
        for t in range(7, 12):
            x, _ = model.hidden(ids[:, t : t + 1], cache=fixed)
            torch.testing.assert_close(model.head(x)[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)  # type: ignore[misc]


@pytest.mark.skipif(library.library("decode") is None, reason="the native kernels are not compiled")
@each
def test_the_written_step_serves_only_what_it_computes(method: str) -> None:
    model, ids = stirred(method, "M-*-"), torch.randint(0, 37, (1, 4))
    with torch.no_grad():
        cache = model.cache(1)
        model(ids, cache=cache)
        served = step(model, ids[:, :1], cache) is not None
    assert served == (method == "qk_norm")


@each
def test_native_folders_hold_it_and_others_refuse(method: str, tmp_path: Path) -> None:
    model, ids = stirred(method), torch.randint(0, 37, (1, 9))
    save(model, tmp_path / "native", format="native")
    again = load(tmp_path / "native", device="cpu")
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = load(tmp_path / "native", device="cpu", dtype="bfloat16")
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.15)
    if method != "qk_norm":
        with pytest.raises(CheckpointError, match="save as native"):
            save(model, tmp_path / "hf", format="hf")
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("d_in,d_out", [(24, 20), (7, 33), (1, 5), (16, 16)])
def test_power_iteration_finds_the_largest_singular_value(d_in: int, d_out: int) -> None:
    layer = SigmaLinear(torch.nn.Linear(d_in, d_out, bias=False), d_in, d_out)
    layer.begin(torch.Generator().manual_seed(0))
    weight = layer.linear.weight
    exact = torch.linalg.svdvals(weight.double())[0]
    assert abs(layer.sigma().double() / exact - 1) < 0.02  # type: ignore[union-attr]
    for _ in range(300):
        layer.advance()
    torch.testing.assert_close(layer.sigma().double(), exact, rtol=1e-5, atol=0)
    # so the weight in use has norm gamma
    with torch.no_grad():
        layer.gamma.fill_(1.7)
        used = layer(torch.eye(d_in)).T
    torch.testing.assert_close(torch.linalg.svdvals(used)[0], torch.tensor(1.7), rtol=1e-5, atol=0)


def test_the_gradient_goes_through_the_norm() -> None:
    torch.manual_seed(3)
    layer = SigmaLinear(torch.nn.Linear(4, 6, bias=False), 4, 6, bias=True).double()
    layer.left.copy_(torch.randn(6)), layer.right.copy_(torch.randn(4))
    layer.gamma.data.fill_(0.8), layer.bias.data.normal_()  # type: ignore[union-attr]
    x, w = torch.randn(3, 4, dtype=torch.float64), layer.linear.weight.detach().clone()  # type: ignore[operator]

    def by_hand(w: Tensor, gamma: Tensor) -> Tensor:
        return x @ (gamma / (layer.left @ w @ layer.right) * w).T + layer.bias

    torch.testing.assert_close(layer(x), by_hand(w, layer.gamma))
    one, two = w.requires_grad_(), layer.gamma.detach().clone().requires_grad_()
    expected = torch.autograd.grad(by_hand(one, two).sin().sum(), (one, two))
    got = torch.autograd.grad(layer(x).sin().sum(), (layer.linear.weight, layer.gamma))
    torch.testing.assert_close(got, expected)


def test_only_a_step_moves_the_vectors() -> None:
    model, ids = stirred("sigma_reparam"), torch.randint(0, 37, (1, 9))
    before = {name: t.clone() for name, t in model.named_buffers()}
    model(ids, labels=ids).loss.backward()  # type: ignore[union-attr]
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    sigma.advance(model)
    moved = [name for name, t in model.named_buffers() if not torch.equal(t, before[name])]
    assert len(moved) == 2 * sum(isinstance(m, SigmaLinear) for m in model.modules()) > 0


def test_codes_cannot_be_reparametrised(tmp_path: Path) -> None:
    config = with_method(
        "sigma_reparam",
        "*-",
        attention={"n_heads": 2, "n_kv_heads": 2, "head_dim": 32, "sigma_reparam": True},
        d_model=128,
    )
    model = build(config, "fp32")
    save(model, tmp_path / "m", format="native")
    with pytest.raises(ConfigError, match="needs weights, not codes"):
        load(tmp_path / "m", device="cpu", recipe="int8")
    with pytest.raises(ConfigError, match="needs weights, not codes"):
        build(config, "int8")


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("attention", {"soft_clip": (0.9, -0.03)}, "soft_clip=.*high >= 1"),
        ("attention", {"soft_cap": 0.0}, "soft_cap=0.0: must be more than 0"),
        ("attention", {"soft_temp": -1.0}, "soft_temp=-1.0"),
        ("mlp", {"layer_scale": 0.0}, "layer_scale=0.0"),
        ("mlp", {"soft_cap": 50.0}, "soft_cap"),
        ("moe", {"sigma_reparam": True}, "stacked experts"),
    ],
)
def test_what_makes_no_sense_is_refused(section: str, settings: dict[str, object], message: str) -> None:
    data = STABLE["qk_norm"].to_dict()
    data[section] = {**data[section], **settings}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(data)


def test_options_that_are_off_are_not_written() -> None:
    data = STABLE["qk_norm"].to_dict()
    assert "soft_cap" not in str(data) and "pre_norm" not in str(data) and "v_norm" not in str(data)
