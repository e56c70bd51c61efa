"""The captured step, run directly: the same tokens as the ordinary decode, whatever the batch, padding and settings."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from plait.engine import graph
from plait.engine.answer import Answer
from plait.engine.engine import Engine
from plait.engine.graph import Steps, bucket
from plait.engine.request import Sampling
from plait.engine.runner import Row, decode, prefill
from plait.engine.sampler import Draw
from plait.engine.session import Session
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid

Tiny = Callable[..., Hybrid]
GREEDY = Sampling(max_tokens=9, temperature=0)
LLAMA = {
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope": {"base": 1000.0}, "qk_norm": True},
    "mlp": {"d_ff": 48, "activation": "silu", "gated": True},
    "ties_embeddings": True,
}


def rows_of(model: Hybrid, prompts: Sequence[list[int]], settings: Sequence[Sampling]) -> list[Row]:
    return [
        Row(p, s, draw=Draw(s, p, 384, model.device), answer=Answer(None), end_ids=frozenset(s.stop_ids))
        for p, s in zip(prompts, settings, strict=True)
    ]


def run(model: Hybrid, prompts: Sequence[list[int]], settings: Sequence[Sampling], *, captured: bool) -> list[Row]:
    with torch.inference_mode():
        rows = rows_of(model, prompts, settings)
        cache = model.cache(len(rows))
        logits = prefill(model, prompts, cache, 64)
        if captured:
            steps = Steps(model)
            assert sum(len(ids) for ids in graph.decode(model, rows, cache, logits, steps)) == sum(
                len(row.ids) for row in rows
            )
        else:
            list(decode(model, rows, cache, logits))
    return rows


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, 384, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize(("pattern", "sizes"), [("M-M*-M", {}), ("*-*-", LLAMA), ("MM", {}), ("*E", {})])
def test_a_padded_batch_gives_the_ids_of_the_ordinary_decode(
    tiny: Tiny, pattern: str, sizes: dict[str, object]
) -> None:
    moe = {"n_experts": 4, "n_chosen": 2, "d_ff": 16, "d_shared": 16}
    model = tiny(pattern, **({"moe": moe} | sizes))
    asked = prompts(1, 15, 33, 7, 20)
    # they end one by one, so that the batch shrinks through its buckets: 8, 2, 1
    settings = [replace(GREEDY, max_tokens=n) for n in (2, 12, 5, 5, 3)]
    ours, exact = (run(model, asked, settings, captured=captured) for captured in (True, False))
    assert [row.ids for row in ours] == [row.ids for row in exact]
    assert all(row.cache_bytes > 0 for row in ours)


def test_every_row_samples_with_its_own_settings_and_seed(tiny: Tiny) -> None:
    model = tiny()
    settings = [
        Sampling(max_tokens=8, temperature=1.3, seed=3),
        Sampling(max_tokens=8, temperature=0.7, top_k=5, seed=2**64 - 1),
        Sampling(max_tokens=8, top_p=0.8, seed=5),
        GREEDY,
        Sampling(max_tokens=8, min_p=0.1, top_k=9, top_p=0.9, seed=0),
    ]
    asked = prompts(4, 30, 11, 2, 9)
    ours, exact = (run(model, asked, settings, captured=captured) for captured in (True, False))
    assert [row.ids for row in ours] == [row.ids for row in exact]


def test_steps_are_used_again_and_made_larger_when_needed(tiny: Tiny) -> None:
    model = tiny()
    steps = Steps(model)
    for lengths, tokens in (((5,), 4), ((3, 9, 2), 6), ((1, 2), 3), ((40,), 1100), ((4, 4), 5)):
        asked = prompts(*lengths)
        settings = [replace(GREEDY, max_tokens=min(tokens, 9))] * len(lengths)
        exact = run(model, asked, settings, captured=False)
        with torch.inference_mode():
            rows = rows_of(model, asked, settings)
            steps.ready(len(rows), 50 if tokens < 1000 else 1100)
            held = steps.cache
            cache = model.cache(len(rows))
            for _ in graph.decode(model, rows, cache, prefill(model, asked, cache, 64), steps):
                assert steps.cache is held
        assert [row.ids for row in rows] == [row.ids for row in exact]
    assert steps.cache is not None and (steps.cache.batch, steps.cache.capacity) == (4, 2048)


def test_a_full_cache_goes_on_in_an_ordinary_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("M*-M")
    asked, settings = prompts(3, 17, 9), [replace(GREEDY, max_tokens=n) for n in (30, 25, 2)]
    exact = run(model, asked, settings, captured=False)
    monkeypatch.setattr(Steps, "ready", lambda self, batch, capacity: [_step(self, 24)])
    ours = run(model, asked, settings, captured=True)
    assert [row.ids for row in ours] == [row.ids for row in exact]


def _step(steps: Steps, capacity: int) -> graph.Step:
    model = steps.model
    cache = graph.StaticCache(model.config, 4, capacity, device=model.device, dtype=model.recipe.compute)
    return graph.Step(model, cache)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines use the captured step, run directly where there is no GPU."""
    monkeypatch.setattr(Steps, "serves", lambda self, rows: all(row.draw.seen is None for row in rows))


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("n_read", [1, 4, 99])
def test_a_stream_that_is_left_or_ended_leaves_a_session_that_goes_on(tiny: Tiny, n_read: int) -> None:
    model, session, prompt = tiny(), Session(), list(range(7, 30))
    stream = Engine(model, prefill_chunk=8).stream(prompt, GREEDY, session)
    for _, _ in zip(range(n_read), stream, strict=False):
        pass
    stream.close()
    answer = stream.completion.token_ids
    assert session.ids == (prompt + answer)[:-1]
    assert session.cache is not None and session.cache.n_tokens == len(session.ids)
    more = [*prompt, *answer, 5, 6]
    again = Engine(model).stream(more, GREEDY, session)
    list(again)
    fresh = Engine(model).stream(more, GREEDY)
    list(fresh)
    assert again.completion.token_ids == fresh.completion.token_ids
    assert again.completion.usage.cached_tokens == len(prompt) + len(answer) - 1


@pytest.mark.usefixtures("captured")
def test_the_engine_decodes_batches_with_it_and_penalties_without(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = graph.generate

    def noted(model: Hybrid, rows: Sequence[Row], *rest: object) -> object:
        used.append(len(rows))
        return real(model, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "generate", noted)
    engine, asked = Engine(tiny(), max_batch=2), prompts(5, 6, 30)
    ids = [c.token_ids for c in engine.generate(asked, GREEDY)]
    assert used == [1, 2] or used == [2, 1]
    assert [c.token_ids for c in engine.generate(asked, replace(GREEDY, repetition_penalty=1.0 + 1e-9))] == ids
    assert len(used) == 2


def held_bytes(cache: Cache) -> int:
    """Bytes that a cache has allocated: spare room counts."""
    states = [state for state in cache.states if state is not None]
    kept = [t for state in states for t in vars(state).values() if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in kept)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("lengths", [(50, 50, 50, 50, 50), (44, 49, 50, 47, 45, 50), (9, 7, 8, 9, 8, 7, 9)])
def test_prompts_are_read_a_few_rows_at_a_time_beside_the_static_cache_alone(
    tiny: Tiny, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, chunk = tiny("M*-*"), prompts(*lengths), 24
    alone = [next(Engine(model).generate(prompt, GREEDY)).token_ids for prompt in asked]
    alive: weakref.WeakSet[Cache] = weakref.WeakSet()
    peaks: list[tuple[int, int]] = []
    begin, hidden = Cache.__init__, Hybrid.hidden

    def born(self: Cache, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)  # type: ignore[arg-type]
        alive.add(self)

    def noted(self: Hybrid, ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        out = hidden(self, ids, *args, **kwargs)  # type: ignore[arg-type]
        # the smaller steps' caches are views of the largest one's
        ordinary = [held_bytes(cache) for cache in alive if not isinstance(cache, graph.StaticCache)]
        peaks.append((len(ordinary), sum(ordinary)))
        assert ids.shape[1] == 1 or ids.numel() <= chunk
        return out

    monkeypatch.setattr(Cache, "__init__", born)
    monkeypatch.setattr(Hybrid, "hidden", noted)
    engine = Engine(model, prefill_chunk=chunk)
    assert [c.token_ids for c in engine.generate(asked, GREEDY)] == alone
    ordered = sorted(lengths, reverse=True)
    groups = [ordered[part] for part in graph.parts(ordered, chunk)]
    most = max(held_bytes(model.cache(len(group), capacity=max(group))) for group in groups)
    assert max(n for n, _ in peaks) == 1 and max(b for _, b in peaks) == most
    # decoding has none but the static one
    assert peaks[-1] == (0, 0)
    static = engine._captured.cache
    assert static is not None and held_bytes(static) == static.batch * held_bytes(model.cache(1, static.capacity))


def test_which_prompts_are_read_together() -> None:
    assert graph.parts([9, 9, 8, 3, 3, 2], 18) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert graph.parts([65536] * 3, 2048) == [slice(i, i + 1) for i in range(3)]
    assert graph.parts([2, 9], 18) == [slice(0, 2)] and graph.parts([2, 10], 18) == [slice(0, 1), slice(1, 2)]


@pytest.mark.usefixtures("captured")
def test_a_batch_that_does_not_fit_is_halved_and_one_that_cannot_be_captured_decoded_plainly(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, tried = tiny("M*-"), prompts(5, 9, 7, 8), []
    exact = [c.token_ids for c in Engine(model).generate(asked, GREEDY)]
    ready = Steps.ready

    def short(self: Steps, batch: int, capacity: int) -> list[graph.Step]:
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ready(self, batch, capacity)

    monkeypatch.setattr(Steps, "ready", short)
    assert [c.token_ids for c in Engine(model).generate(asked, GREEDY)] == exact and tried == [4, 2, 2]

    def never(self: Steps, batch: int, capacity: int) -> list[graph.Step]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Steps, "ready", never)
    assert [c.token_ids for c in Engine(model).generate(asked, GREEDY)] == exact


def test_logits_that_are_no_numbers_stop_the_decode(tiny: Tiny) -> None:
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError):
        run(model, prompts(3, 4), [GREEDY] * 2, captured=True)


def test_rows_for_larger_batches_are_kept_only_where_they_cost_little(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("M*-")
    assert [step.cache.batch for step in Steps(model).ready(5, 100)] == [1, 2, 8]
    monkeypatch.setattr(graph, "SPARE_BYTES", 1000)
    steps = Steps(model)
    assert [step.cache.batch for step in steps.ready(5, 100)] == [1, 2, 5]
    # of the five rows, all that a bucket of eight would have
    assert [step.cache.batch for step in steps.ready(5, 90)] == [1, 2, 5] and steps.cache is not None
    assert [step.cache.batch for step in steps.ready(3, 90)] == [1, 4] and steps.cache.batch == 5
    assert [c.token_ids for c in Engine(model).generate(prompts(3, 4, 5), GREEDY)]


def test_rows_and_room_of_the_last_cache_are_kept_only_where_they_cost_little(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("M*-")
    steps = Steps(model)
    row = steps._bytes(1, 1024)
    assert row == held_bytes(graph.StaticCache(model.config, 1, 1024, device=model.device, dtype=torch.float32))

    def sizes(*asked: tuple[int, int]) -> list[tuple[int, int]]:
        return [(steps.ready(*one), steps.cache and (steps.cache.batch, steps.cache.capacity))[1] for one in asked]  # type: ignore[misc]

    monkeypatch.setattr(graph, "SPARE_BYTES", 4 * row)
    # one long prompt, then many short ones, and back: never many long ones
    assert sizes((1, 5000), (16, 100), (1, 5000)) == [(1, 5120), (16, 1024), (1, 5120)]
    assert sizes((1, 6000), (2, 900), (3, 2000)) == [(1, 6144), (2, 1024), (4, 2048)]
    # states count like keys: without any keys, 31 rows too many
    states = Steps(tiny("M"))
    monkeypatch.setattr(graph, "SPARE_BYTES", 30 * states._bytes(1, 1024))
    assert states._bytes(1, 1024) > 0 and states.ready(33, 10)[-1].cache.batch == 33


@pytest.mark.usefixtures("captured")
def test_answers_read_in_turns_do_not_disturb_each_other(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("M*-")
    first, second, third = prompts(9, 14, 5)
    alone = [next(Engine(model).generate(prompt, GREEDY)).token_ids for prompt in (first, second, third)]
    engine, session = Engine(model), Session()
    one, two = engine.stream(first, GREEDY), engine.stream(second, GREEDY, session)
    next(one), next(one), next(two)
    assert next(engine.generate(third, GREEDY)).token_ids == alone[2]
    for _ in zip(one, two, strict=False):
        pass
    list(one), list(two)
    assert [one.completion.token_ids, two.completion.token_ids] == alone[:2]
    assert session.ids == (second + alone[1])[:-1] and session.cache is not None
    assert session.cache.n_tokens == len(session.ids)
    assert "another answer of this engine is not finished" in caplog.text
    # the place is free again: after an end, after being left, after a failure
    caplog.clear()
    left = engine.stream(first, GREEDY)
    next(left)
    left.close()
    assert next(engine.generate(first, GREEDY)).token_ids == alone[0]
    with torch.no_grad():
        model.norm.weight.mul_(torch.nan)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            next(engine.generate(first, GREEDY))
    assert not caplog.text


def test_each_gpu_captures_on_a_stream_of_its_own(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    class Stream:
        def __init__(self, device: object) -> None:
            self.device = device

        def wait_stream(self, other: object) -> None: ...

    def capturing(graph: object, pool: object = None, stream: object = None) -> contextlib.AbstractContextManager[None]:
        used.append(stream)
        return contextlib.nullcontext()

    for name, fake in {
        "Stream": Stream,
        "CUDAGraph": object,
        "graph": capturing,
        "current_stream": lambda: Stream(None),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model = tiny("M")
    step = _step(Steps(model), 8)
    graph.capture_stream.cache_clear()
    with torch.inference_mode():
        for index in (0, 1, 0):
            monkeypatch.setattr(Hybrid, "device", torch.device("cuda", index))
            monkeypatch.setattr(step, "_step", lambda: None)
            step.capture()
    graph.capture_stream.cache_clear()
    assert [stream.device.index for stream in used] == [0, 1, 0] and used[0] is used[2]  # type: ignore[attr-defined]


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 8, 9, 32, 33, 100)] == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "sizes"), [("M-M*-M", {}), ("*-*-", LLAMA)])
def test_the_captured_graph_gives_the_ids_of_the_ordinary_decode(
    tiny: Tiny, pattern: str, sizes: dict[str, object]
) -> None:
    model = tiny(pattern, **sizes).to("cuda")
    asked, settings = prompts(1, 15, 33, 7, 20), [replace(GREEDY, max_tokens=n) for n in (2, 12, 5, 5, 3)]
    ours, exact = (run(model, asked, settings, captured=captured) for captured in (True, False))
    assert [row.ids for row in ours] == [row.ids for row in exact]
