"""What is seen inside a model equals float64 written out, and looking changes nothing."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.model.sizes import METHODS, with_method
from tests.train.test_loop import SCHEDULE, Stop, equal, weights
from tests.train.tiny import objective, tiny_config, tiny_model
from torch import Tensor

from plait.data.shards import Dataset
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.train.loop import TrainConfig, train
from plait.train.telemetry import QUANTILES, measure

PATTERN = "M-*E"
# documents that begin inside the rows
STARTS = ([0, 9], [0, 1, 17])


def lively(**attention: object) -> Hybrid:
    """Weights large enough that logits and gates differ."""
    config = tiny_config(PATTERN)
    layers = tuple(replace(s, **attention) if s.symbol == "*" else s for s in config.layers)
    model = build(replace(config, init_std=0.4, layers=layers), "fp32", seed=1)
    with torch.no_grad():
        for name, t in model.named_parameters():
            if t.dim() == 1 and "norm" in name:
                t.add_(torch.randn(t.shape) * 0.2)
    return model


def rows() -> tuple[Tensor, Tensor]:
    ids, starts = torch.randint(0, 60, (2, 24)), torch.zeros(2, 24, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, places] = True
    return ids, starts


def inputs_of(model: Hybrid, ids: Tensor, starts: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each mixer reads and what it adds to the stream, float64."""
    _, streams = model.hidden(ids, starts=starts, keeps_all=True)
    streams = [x.detach().double() for x in streams]
    read = []
    for block, x in zip(model.blocks, streams, strict=False):
        normed = x / (x.pow(2).mean(-1, keepdim=True) + block.norm.eps).sqrt()  # type: ignore[union-attr]
        read.append(normed * block.norm.weight.double())  # type: ignore[union-attr]
    return read, [b - a for a, b in zip(streams[:-2], streams[1:-1], strict=True)]


def l2(*parts: Tensor) -> float:
    return float(torch.cat(parts, -1).detach().pow(2).sum(-1).sqrt().mean())


def near(value: object, rel: float = 2e-4) -> object:
    return pytest.approx(value, rel=rel, abs=1e-6)


def test_outputs_are_measured_as_they_are() -> None:
    model, (ids, starts) = lively(), rows()
    figures, _ = measure(model, ids, starts)
    read, added = inputs_of(model, ids, starts)
    w = {name: p.detach().double() for name, p in model.named_parameters()}

    def out(i: int, name: str) -> Tensor:
        return read[i] @ w[f"blocks.{i}.mixer.{name}.weight"].T

    assert figures["blocks.0.in_proj.l2"] == near(l2(out(0, "in_proj")))
    assert figures["blocks.0.out_proj.l2"] == near(l2(added[0]))
    assert figures["blocks.1.fc1.l2"] == near(l2(out(1, "up_proj")))
    assert figures["blocks.1.fc2.l2"] == near(l2(added[1]))
    assert figures["blocks.2.qkv.l2"] == near(l2(*(out(2, f"{n}_proj") for n in "qkv")))
    assert figures["blocks.2.proj.l2"] == near(l2(added[2]))
    assert figures["blocks.3.shared.fc1.l2"] == near(l2(out(3, "shared.up_proj")))
    assert figures["blocks.3.latent_in.l2"] == near(l2(out(3, "latent_in")))


@pytest.mark.parametrize("options", [{}, {"soft_cap": 1.0, "soft_temp": 0.5}, {"soft_clip": (1.03, -0.03)}])
@pytest.mark.parametrize("at_once", [1 << 22, 500])
def test_logits_and_entropy_equal_loops(
    options: dict[str, object], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("plait.ops.soft_attention"), "LOGITS", at_once)
    model, (ids, starts) = lively(**options), rows()
    figures, heads = measure(model, ids, starts)
    read, _ = inputs_of(model, ids, starts)
    mixer = model.blocks[2].mixer
    q, k = ((read[2] @ p.weight.double().T).detach().unflatten(-1, (-1, 8)) for p in (mixer.q_proj, mixer.k_proj))  # type: ignore[union-attr]
    largest, entropy = [-math.inf] * 4, [0.0] * 4
    for row, places in enumerate(STARTS):
        for t in range(24):
            first = max(place for place in places if place <= t)
            for h in range(4):
                z = k[row, first : t + 1, h // 2] @ q[row, t, h] / 8**0.5 * float(str(options.get("soft_temp", 1.0)))
                largest[h] = max(largest[h], float(z.max()))
                z = z if "soft_cap" not in options else torch.tanh(z)
                p = z.softmax(0)
                entropy[h] -= float((p * p.log()).sum()) / 48
    assert heads["blocks.2.max_logit"] == near(largest)
    assert figures["blocks.2.max_logit"] == near(max(largest))
    assert heads["blocks.2.entropy"] == near(entropy)
    assert figures["blocks.2.entropy"] == near(sum(entropy) / 4)


def test_states_steps_and_gates_equal_the_recurrence() -> None:
    model, (ids, starts) = lively(), rows()
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.dt_bias.add_(2.0), mixer.in_proj.weight[:32].mul_(4.0)  # type: ignore[operator,union-attr,index]
    figures, heads = measure(model, ids, starts)
    read, _ = inputs_of(model, ids, starts)
    y = (read[0] @ mixer.in_proj.weight.double().T).detach()  # type: ignore[union-attr]
    z, xbc, raw = y.split([32, 64, 4], -1)
    dt = torch.log1p(torch.exp(raw + mixer.dt_bias.detach().double()))  # type: ignore[operator,union-attr]
    decay = torch.exp(-dt * mixer.A_log.detach().double().exp())  # type: ignore[union-attr,operator]
    taps, bias = mixer.conv.weight.detach().double(), mixer.conv.bias.detach().double()  # type: ignore[union-attr]
    state = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    for row, places in enumerate(STARTS):
        for t in range(24):
            first = max(place for place in places if place <= t)
            c = sum(xbc[row, t - j] * taps[:, 3 - j] for j in range(4) if t - j >= first) + bias
            x, b, _ = (c * torch.sigmoid(c)).split([32, 16, 16])
            for h in range(4):
                old = state[row, h] if t > first else 0.0
                pushed = dt[row, t, h] * torch.outer(x.view(4, 8)[h], b.view(2, 8)[h // 2])
                state[row, h] = decay[row, t, h] * old + pushed
    norms = state.flatten(2).norm(dim=-1).mean(0)
    assert heads["blocks.0.state.norm"] == near(norms.tolist())
    assert figures["blocks.0.state.max"] == near(float(state.abs().max()))
    for name, values in (("dt", dt), ("decay", decay)):
        flat = values.flatten(0, 1)
        expected = [[float(flat[:, h].quantile(p)) for p in QUANTILES] for h in range(4)]
        assert heads[f"blocks.0.{name}"] == [near(row) for row in expected]
        assert figures[f"blocks.0.{name}.p95"] == near(float(flat.quantile(0.95)))
    gate = torch.sigmoid(z).unflatten(-1, (4, 8))
    closed, wide = (gate < 0.05).double().mean((0, 1, 3)), (gate > 0.95).double().mean((0, 1, 3))
    assert 0 < closed.min() and 0 < wide.min()
    assert heads["blocks.0.gate.closed"] == near(closed.tolist())
    assert heads["blocks.0.gate.open"] == near(wide.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_looked_at(method: str) -> None:
    model = build(with_method(method), "fp32")
    ids = torch.randint(0, 37, (2, 9))
    before = model(ids).logits
    figures, heads = measure(model, ids)
    assert {"blocks.2.max_logit", "blocks.2.qkv.l2", "blocks.0.in_proj.l2", "blocks.1.fc2.l2"} <= figures.keys()
    assert all(map(math.isfinite, figures.values())) and heads
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model_is_looked_at_uncompiled() -> None:
    model, (ids, starts) = lively(), rows()
    plain = measure(model, ids, starts)
    for block in model.blocks:
        block.compile(backend="eager")
    model.hidden(ids, starts=starts)
    assert measure(model, ids, starts) == plain


def test_a_run_with_telemetry_ends_with_the_same_bits_and_resumes_its_lines(words: Dataset, tmp_path: Path) -> None:
    settings = TrainConfig(steps=8, schedule=SCHEDULE, telemetry_every=2)
    plain, whole, torn = tiny_model("ME*-"), tiny_model("ME*-"), tiny_model("ME*-")
    train(plain, objective(words), replace(settings, telemetry_every=0), tmp_path / "plain")
    assert not (tmp_path / "plain" / "telemetry.jsonl").exists()
    train(whole, objective(words), settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(torn, objective(words), settings, tmp_path / "torn", on_step=Stop(5))
    # a line of a step that was never saved
    with (tmp_path / "torn" / "telemetry.jsonl").open("a") as file:
        file.write('{"step": 6, "skipped": 0, "figures": {}}\n')
    train(torn, objective(words), settings, tmp_path / "torn")
    assert equal(weights(plain), weights(whole)) and equal(weights(plain), weights(torn))
    lines = [[json.loads(x) for x in (tmp_path / n / "telemetry.jsonl").open()] for n in ("whole", "torn")]
    for found in lines:
        assert [line["step"] for line in found] == [2, 4, 6, 8]
        assert all(line.pop("seconds") > 0 for line in found)
    assert lines[0] == lines[1]


def test_what_is_no_number_is_written_as_a_word(tmp_path: Path) -> None:
    from plait.train.telemetry import Telemetry

    model = tiny_model("-*")
    with torch.no_grad():
        model.blocks[0].mixer.down_proj.weight.fill_(float("inf"))  # type: ignore[union-attr]
    telemetry = Telemetry(tmp_path / "t.jsonl", after=0)
    telemetry.write(model, torch.randint(0, 60, (1, 5)), None, step=1, skipped=0)
    telemetry.close()
    (line,) = [json.loads(x, parse_constant=pytest.fail) for x in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert line["figures"]["blocks.0.fc2.l2"] in ("inf", "nan")


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", "ternary"])
def test_operands_in_few_bits_are_measured(recipe: str) -> None:
    # the in-projection has 256 + 320 + 8 rows and 24 more groups of state: a multiple of 16
    sizes = {"mamba2": {"n_heads": 16, "head_dim": 16, "d_state": 32, "n_groups": 1}, "mlp": {"d_ff": 256}}
    attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
    config = ModelConfig.from_pattern("M-*-M-*-", vocab_size=64, d_model=128, attention=attention, **sizes)
    model = build(config, recipe, seed=1)
    ids, starts = rows()
    plain = model.hidden(ids, starts=starts)[0].detach()
    figures, _ = measure(model, ids, starts)
    assert torch.equal(plain, model.hidden(ids, starts=starts)[0])
    assert all(p.grad is None for p in model.parameters())
    at = "blocks.3.mixer.up_proj"
    layer = model.get_submodule(at)
    w = layer.weight.detach()  # type: ignore[operator,union-attr]
    # the gradient by hooks of its own
    seen: dict[str, Tensor] = {}

    def hook(module: object, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen["x"] = args[0].detach()
        y.register_hook(lambda g: seen.update(dy=g))

    handle = layer.register_forward_hook(hook)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    targets[:, :-1][starts[:, 1:]] = -100
    x, _ = model.hidden(ids, starts=starts)
    model.loss_sum(x, targets, scale=1 / int((targets >= 0).sum())).backward()
    handle.remove()
    assert figures[f"{at}.x.amax"] == near(float(seen["x"].abs().max()))
    assert figures[f"{at}.w.amax"] == near(float(w.abs().max()))
    assert 0 <= figures[f"{at}.x.underflow"] < 0.2
    if recipe != "ternary":
        assert figures[f"{at}.dy.amax"] == near(float(seen["dy"].abs().max()))
        assert 0 <= figures[f"{at}.dy.underflow"] < 0.5
    else:
        assert figures[f"{at}.w.underflow"] == near(float((w.abs() <= w.abs().mean() / 2).double().mean()), rel=0.01)
    assert not any(m._forward_hooks or getattr(m, "watch", None) for m in model.modules())
