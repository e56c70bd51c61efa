"""Captured steps of the running batch, run directly where there is no GPU: the same answers in batches of any size."""

import random
from collections.abc import Callable

import pytest
import torch

from plait.engine import core
from plait.engine.core import Limits
from plait.engine.engine import Engine
from plait.engine.request import Request, Sampling
from plait.model.hybrid import Hybrid

Tiny = Callable[..., Hybrid]


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    handles = [engine.submit(request) for request in requests]
    found: dict[int, list[int]] = {id(handle): [] for handle in handles}
    while engine.has_work():
        for delta in engine.step():
            found[id(delta.handle)] += delta.token_ids
    return [found[id(handle)] for handle in handles]


def mixed(n: int) -> list[Request]:
    r = random.Random(0)
    greedy = [Sampling(max_tokens=r.randint(1, 90), temperature=0.0, ignore_eos=True) for _ in range(n)]
    return [Request(prompt_ids=tuple(r.randrange(384) for _ in range(r.randint(1, 140))), sampling=s) for s in greedy]


@pytest.mark.parametrize("pattern", ["M-M*-M", "*-*-", "MM"])
def test_captured_steps_give_the_same_answers(tiny: Tiny, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(pattern)
    wanted = answers(Engine(model), mixed(7))
    monkeypatch.setattr(core, "step_rows", lambda *args: None)
    engine = Engine(model, limits=Limits(step_tokens=100))
    replays = engine.core.replays
    # as if it had been captured: the same step on the same tensors
    replays.captures = True
    assert replays.fits and answers(engine, mixed(7)) == wanted
    sizes = set(replays._steps)
    assert {batch for batch, _ in sizes} <= {1, 2, 4, 8} and len(sizes) > 3


def test_models_and_memory_that_cannot_be_captured_are_known(tiny: Tiny) -> None:
    soft = {"attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "soft_cap": 5.0}}
    assert not Engine(tiny(**soft)).core.replays.fits
    assert not Engine(tiny(), limits=Limits(kv="int8")).core.replays.fits
    assert not Engine(tiny(), limits=Limits(state="fp16-sr")).core.replays.fits
    assert not Engine(tiny("ME", moe={"n_experts": 4, "n_chosen": 2, "d_ff": 16})).core.replays.fits
    assert Engine(tiny(), limits=Limits(state="bf16")).core.replays.fits


@pytest.mark.gpu
def test_captured_steps_on_a_gpu_give_the_same_answers(tiny: Tiny) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model = tiny().cuda()
    captured = Engine(model)
    found = answers(captured, mixed(7))
    assert all(step.graph is not None for step in captured.core.replays._steps.values())
    plain = Engine(model)
    plain.core.replays.captures = False
    same = sum(a == b for a, b in zip(answers(plain, mixed(7)), found, strict=True))
    # sums in another order may decide between equal tokens
    assert same >= 6
