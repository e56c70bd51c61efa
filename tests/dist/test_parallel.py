"""Recompute and compilation change when blocks run, not what they compute."""

import pytest
import torch
from tests.train.tiny import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from plait.dist import parallel
from plait.model.hybrid import Block


def gradients(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_recompute_gives_the_same_gradients_bit_for_bit(recipe: str) -> None:
    model, ids = tiny_model("ME*-", recipe=recipe), torch.randint(0, 64, (2, 19))
    names = list(model.state_dict())
    plain = gradients(model, ids)
    again = gradients(parallel.recompute(model), ids)
    assert all(torch.equal(plain[name], again[name]) for name in plain) and plain.keys() == again.keys()
    assert list(model.state_dict()) == names


def test_recompute_keeps_less_for_the_backward_pass() -> None:
    def kept(model: torch.nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            model(ids, labels=ids)
        return sum(sizes)

    model, ids = tiny_model("M-M-"), torch.randint(0, 64, (2, 40))
    assert kept(parallel.recompute(tiny_model("M-M-"))) < kept(model) / 3


def test_recompute_runs_each_block_once_more_and_only_once_when_asked_twice() -> None:
    model, ids, calls = tiny_model("MM"), torch.randint(0, 64, (1, 8)), []
    model.blocks[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    parallel.recompute(parallel.recompute(model))
    gradients(model, ids)
    assert len(calls) == 2


def test_a_recomputed_model_still_generates_from_its_cache() -> None:
    model, ids = parallel.recompute(tiny_model()), torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        cache = model.cache(1)
        model(ids[:, :8], cache=cache)
        step = model(ids[:, 8:], cache=cache).logits
        torch.testing.assert_close(step, model(ids).logits[:, 8:], rtol=1e-5, atol=1e-5)


def test_on_a_cpu_compilation_is_left_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parallel.compile_blocks(tiny_model(), "auto")
    assert not parallel.compile_blocks(tiny_model(), "off")
    monkeypatch.setattr(parallel.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        parallel.compile_blocks(tiny_model(), "on")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the C++ compiler takes minutes where others are busy
def test_compiled_blocks_give_the_same_gradients() -> None:
    model, ids = tiny_model("M*-"), torch.randint(0, 64, (2, 19))
    names = list(model.state_dict())
    plain = gradients(model, ids)
    assert parallel.compile_blocks(model, "on")
    again = gradients(model, ids)
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("how", ["eager", "aot_eager", "recomputed"])
def test_compiled_blocks_have_no_graph_break_and_serve_every_length(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "eager" if how == "recomputed" else how
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        Block, "compile", lambda block, **given: compile_module(block, backend=backend, fullgraph=True, **given)
    )
    torch._dynamo.reset()
    counters.clear()
    plain, model = tiny_model("MM*-"), tiny_model("MM*-")
    if how == "recomputed":
        parallel.recompute(model)
    parallel.compile_blocks(model, "on")
    compiled = []
    for L in (19, 33, 64, 65, 130):
        ids, starts = torch.randint(0, 64, (2, L)), torch.zeros(2, L, dtype=torch.bool)
        starts[:, 0] = starts[0, L // 2] = starts[1, L // 3] = True
        found = [_packed_gradients(m, ids, starts) for m in (plain, model)]
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    # one for each kind of layer
    assert compiled == [3] * 5


def _packed_gradients(model: torch.nn.Module, ids: Tensor, starts: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, starts=starts).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_experts_are_left_uncompiled() -> None:
    model = tiny_model("ME*-")
    parallel.compile_blocks(model, "on")
    assert [block._compiled_call_impl is not None for block in model.blocks] == [True, False, True, True]
