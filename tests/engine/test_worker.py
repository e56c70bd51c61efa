"""The worker: streams of many readers, leaving early, bad requests, draining, and a failing engine."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from plait.engine.engine import Engine
from plait.engine.request import FinishReason, Request, Sampling
from plait.engine.worker import Worker, WorkerError
from plait.model.hybrid import Hybrid

Tiny = Callable[..., Hybrid]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def request(*ids: int, **changes: object) -> Request:
    return Request(prompt_ids=ids, **({"sampling": GREEDY} | changes))  # type: ignore[arg-type]


async def read(worker: Worker, asked: Request) -> list[int]:
    return [i async for delta in worker.stream(asked) for i in delta.token_ids]


def test_streams_give_what_generate_gives(tiny: Tiny) -> None:
    model = tiny()
    prompts = [(1, 2, 3), (4,), (5, 6), (7, 8, 9, 10)]
    wanted = [c.token_ids for c in Engine(model).generate([list(p) for p in prompts], GREEDY)]
    worker = Worker(Engine(model, max_batch=2))

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(read(worker, request(*p)) for p in prompts))

    assert asyncio.run(all_of_them()) == wanted
    assert worker.close()
    load = worker.load()
    assert (load.running, load.waiting, load.finished) == (0, 0, 4)


def test_n_answers_come_under_their_indices(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))

    async def run() -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}
        async for delta in worker.stream(request(1, 2, n=3)):
            answers.setdefault(delta.index, []).extend(delta.token_ids)
        return answers

    answers = asyncio.run(run())
    assert sorted(answers) == [0, 1, 2] and answers[0] == answers[1] == answers[2] and len(answers[0]) == 12
    worker.close()


def test_leaving_a_stream_cancels_its_request(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))
    long = Sampling(max_tokens=100_000, temperature=0.0, ignore_eos=True)

    async def leave() -> None:
        stream = worker.stream(request(1, sampling=long))
        async for _ in stream:
            break
        await stream.aclose()
        # a task that is cancelled while it waits
        task = asyncio.create_task(read(worker, request(2, sampling=long)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert worker.close(timeout_s=20)
    assert worker.load().finished == 2


def test_a_bad_request_raises_before_its_first_delta_and_disturbs_nobody(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))

    async def run() -> list[int]:
        good = asyncio.create_task(read(worker, request(1)))
        with pytest.raises(ValueError, match=r"prompt_ids\[1\] is token id 9999"):
            await read(worker, request(1, 9999))
        return await good

    assert len(asyncio.run(run())) == 12
    worker.close()
    with pytest.raises(WorkerError, match="no more requests"):
        asyncio.run(read(worker, request(1)))


def test_closing_without_draining_ends_streams_as_cancelled(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))

    async def run() -> list[FinishReason | None]:
        reasons = []
        async for delta in worker.stream(request(1, sampling=Sampling(max_tokens=100_000, ignore_eos=True))):
            if not reasons:
                await asyncio.to_thread(worker.close, drain=False)
            reasons.append(delta.finish_reason)
        return reasons

    assert asyncio.run(run())[-1] == "cancelled"


def test_a_failing_engine_ends_every_stream_with_its_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny())
    worker = Worker(engine)

    def broken() -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "step", broken)
    with pytest.raises(WorkerError, match="no room"):
        asyncio.run(read(worker, request(1)))
    assert not worker.is_alive and isinstance(worker.failure, MemoryError)


def test_an_answer_whose_time_is_over_ends_as_it_is(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))
    endless = Sampling(max_tokens=1_000_000, ignore_eos=True)

    async def run() -> FinishReason | None:
        deltas = [d async for d in worker.stream(request(1, sampling=endless, deadline_s=0.1))]
        return deltas[-1].finish_reason

    assert asyncio.run(run()) == "timeout"
    worker.close()


def test_a_request_that_comes_in_the_step_that_fails_is_told_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny())
    worker = Worker(engine)
    failing, go = threading.Event(), threading.Event()

    def broken() -> None:
        failing.set()
        go.wait(10)
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "step", broken)

    async def run() -> list[object]:
        first = asyncio.create_task(read(worker, request(1)))
        await asyncio.to_thread(failing.wait, 10)
        # it is queued while the step runs, and nobody will ever step it
        late = asyncio.create_task(read(worker, request(2)))
        await asyncio.sleep(0)
        go.set()
        async with asyncio.timeout(10):
            return await asyncio.gather(first, late, return_exceptions=True)

    assert [type(error) for error in asyncio.run(run())] == [WorkerError, WorkerError]


def test_a_call_that_nobody_waits_for_any_more_does_no_harm(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny())
    worker = Worker(engine)
    held, go = threading.Event(), threading.Event()
    worker.call(lambda _: (held.set(), go.wait(10)))
    assert held.wait(10)
    called = []
    left = worker.call(called.append)
    assert left.cancel()
    go.set()
    assert len(asyncio.run(read(worker, request(1)))) == 12
    assert not called and worker.close()


def test_a_draining_worker_takes_no_more_requests(tiny: Tiny) -> None:
    worker = Worker(Engine(tiny()))

    async def run() -> bool:
        stream = worker.stream(request(1, sampling=Sampling(max_tokens=100_000, ignore_eos=True)))
        await anext(stream)
        closing = asyncio.create_task(asyncio.to_thread(worker.close, drain=True))
        while worker.is_alive:
            await asyncio.sleep(0.001)
        with pytest.raises(WorkerError, match="no more requests"):
            await read(worker, request(2))
        await stream.aclose()
        return await closing

    assert asyncio.run(run())
