"""The way of a request through the server: let in, read, understood, answered in pieces or whole, and let go.

    key -> place -> body -> JSON -> ids (beside the event loop) -> places for all its answers -> engine -> events

A client that leaves is noticed at once and its request cancelled, whether a token was made or not.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from plait.engine.request import FinishReason
from plait.engine.sequence import Delta
from plait.engine.worker import WorkerError
from plait.serve.ask import Asked
from plait.serve.error import RequestError
from plait.serve.limits import Limits, drop_body, read_body
from plait.serve.protocol import Sampled
from plait.serve.schema import parse, read
from plait.serve.served import House, Served

Event = dict[str, object]
B = TypeVar("B", bound=Sampled)

# a stream says that it lives when it has nothing else to say for so long
_SILENCE_S = 10.0


class Form(Protocol):
    """How a route writes its answers."""

    names_events: bool
    """whether each event of a stream has a line with its type, and none says that it is over"""

    def begin(self) -> list[Event]:
        """Events before the first token."""
        ...

    def add(self, prompt: int, delta: Delta) -> list[Event]:
        """Take a piece of an answer to one of the prompts; the events that tell of it."""
        ...

    def spoken(self) -> dict[str, object]:
        """The first answer as a message of a conversation."""
        ...

    def end(self) -> list[Event]:
        """Events after the last."""
        ...

    def whole(self) -> Event:
        """All of it as one object."""
        ...


class Door(Generic[B]):
    """A route that generates."""

    def __init__(
        self,
        house: House,
        body: type[B],
        ask: Callable[[B, Served, Limits, str], Asked],
        form: Callable[[B, Served, Asked, str], Form],
    ) -> None:
        """
        Args:
            house: where it is.
            body: what is asked, as a dataclass.
            ask: turns it into requests of the engine; runs in a thread.
            form: makes what writes the answers.
        """
        self._house, self._body, self._ask, self._form = house, body, ask, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        has_read = False
        try:
            served = self._house.served
            with self._house.gate.enter() as place:
                raw = await read_body(request, self._house.limits)
                has_read = True
                await attended(receive, self._answer(raw, served, place.take, request, send))
        except RequestError:
            if not has_read:
                await drop_body(request)
            raise

    async def _answer(
        self, raw: bytes, served: Served, take: Callable[[int], None], request: Request, send: Send
    ) -> None:
        note = request.scope["plait"]
        body, asked = await self._understood(raw, served, note["id"])
        try:
            take(asked.n_answers - 1)
            note |= {"prompt_tokens": sum(len(r.prompt_ids) for r in asked.requests), "answers": asked.n_answers}
            form = self._form(body, served, asked, note["id"])
            async with aclosing(_deltas(served, asked)) as deltas:
                watched = _kept(self._watched(deltas, note), form, asked)
                if body.stream:
                    await _send_stream(send, _events(form, watched), form.names_events)
                    return
                async for prompt, delta in watched:
                    form.add(prompt, delta)
                answer = form.whole()
            await send_json(send, answer)
        finally:
            if asked.turn is not None:
                asked.turn.leave()

    async def _understood(self, raw: bytes, served: Served, request_id: str) -> tuple[B, Asked]:
        """The work of `_understand` in a thread, which cannot be stopped: what it took must be given back."""
        reading = asyncio.ensure_future(self._house.by_hand(self._understand, raw, served, request_id))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            reading.add_done_callback(_give_back)
            raise

    def _understand(self, raw: bytes, served: Served, request_id: str) -> tuple[B, Asked]:
        body = read(self._body, parse(raw))
        return body, self._ask(body, served, self._house.limits, request_id)

    async def _watched(
        self, deltas: AsyncIterator[tuple[int, Delta]], note: dict[str, object]
    ) -> AsyncIterator[tuple[int, Delta]]:
        """Count and time what passes; a piece that says that its answer has failed raises."""
        metrics, arrived = self._house.metrics, note["arrived"]
        assert isinstance(arrived, float)
        last: dict[tuple[int, int], float] = {}
        n_tokens = 0
        async for prompt, delta in deltas:
            now = time.perf_counter()
            key = (prompt, delta.index)
            if delta.token_ids:
                if key in last:
                    # a step that makes several tokens shares its time among them
                    each = (now - last[key]) / len(delta.token_ids)
                    for _ in delta.token_ids:
                        metrics.between.observe(each)
                else:
                    if not last:
                        note["first_s"] = now - arrived
                    metrics.first.observe(now - arrived)
                last[key] = now
                n_tokens += len(delta.token_ids)
                note["tokens"] = n_tokens
            if delta.finish_reason is not None:
                metrics.ends.labels(str(delta.finish_reason)).inc()
                note["reason"] = str(delta.finish_reason)
                _check(delta, self._house.limits)
            yield prompt, delta


async def attended(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Do something for a client, and stop in the middle of it when the client leaves.

    Raises: ClientDisconnect; whatever the work raises.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def send_json(send: Send, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Answer with one JSON object."""
    body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    plain = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    raw = [(name.encode(), text.encode("latin-1")) for name, text in plain.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _deltas(served: Served, asked: Asked) -> AsyncGenerator[tuple[int, Delta], None]:
    """The pieces of all prompts' answers as they come."""
    try:
        if len(asked.requests) == 1:
            async with aclosing(served.worker.stream(asked.requests[0])) as stream:
                async for delta in stream:
                    yield 0, delta
            return
        inbox: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(_follow(served, asked, i, inbox)) for i in range(len(asked.requests))]
        try:
            left = len(tasks)
            while left:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    except WorkerError as error:
        # what went wrong inside is for the log: it may name files
        raise RequestError("the engine has failed or is about to stop; try again later", status=503) from error
    except RequestError:
        raise
    except ValueError as error:
        # the engine refuses what its cache cannot hold
        raise RequestError(str(error), "prompt") from None


async def _kept(
    deltas: AsyncIterator[tuple[int, Delta]], form: Form, asked: Asked
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The same pieces; once all have come, and before anybody is told so, the turn of a session is saved."""
    delta = None
    async for prompt, delta in deltas:
        yield prompt, delta
    if asked.turn is not None and delta is not None:
        await asked.turn.end(delta.handle.session, form.spoken())


def _give_back(reading: "asyncio.Future[tuple[B, Asked]]") -> None:
    if not reading.cancelled() and reading.exception() is None and (turn := reading.result()[1].turn) is not None:
        turn.leave()


async def _follow(
    served: Served, asked: Asked, i: int, inbox: "asyncio.Queue[tuple[int, Delta] | BaseException | None]"
) -> None:
    try:
        async with aclosing(served.worker.stream(asked.requests[i])) as stream:
            async for delta in stream:
                inbox.put_nowait((i, delta))
        inbox.put_nowait(None)
    except Exception as error:
        # raised again where the pieces are read
        inbox.put_nowait(error)


def _check(delta: Delta, limits: Limits) -> None:
    match delta.finish_reason:
        case FinishReason.ERROR:
            fault = delta.handle.request.constraint is not None
            raise RequestError(
                delta.error or "the answer has failed",
                "response_format" if fault else None,
                status=400 if fault else 500,
            )
        case FinishReason.TIMEOUT:
            raise RequestError(f"the answer was not complete after {limits.seconds:g} s", status=504)
        case FinishReason.CANCELLED:
            raise RequestError("the server stops; the answer is not complete", status=503, retry_after=1)


async def _events(form: Form, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncGenerator[Event, None]:
    begun = False
    async for prompt, delta in deltas:
        if not begun:
            # only now is it certain that the engine has taken the request
            begun = True
            for event in form.begin():
                yield event
        for event in form.add(prompt, delta):
            yield event
    for event in form.end():
        yield event


async def _send_stream(send: Send, events: AsyncGenerator[Event, None], named: bool) -> None:
    """Server-sent events. A failure after the first is told in the stream; one before it raises."""
    begun = False

    async def write(data: bytes, more: bool = True) -> None:
        nonlocal begun
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        begun = True
        await send({"type": "http.response.body", "body": data, "more_body": more})

    upcoming: asyncio.Future[Event] = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait((upcoming,), timeout=_SILENCE_S)
            if not done:
                await write(b": still here\n\n")
                continue
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                break
            upcoming = asyncio.ensure_future(anext(events))
            await write(_encoded(event, named))
        if not named:
            await write(b"data: [DONE]\n\n")
    except RequestError as error:
        if not begun:
            raise
        kind = "error" if named else None
        await write(_encoded(error.to_dict() | ({"type": kind} if kind else {}), named))
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        await events.aclose()
    await write(b"", more=False)


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # a proxy that collects a stream makes it none
    (b"x-accel-buffering", b"no"),
]


def _encoded(event: Event, named: bool) -> bytes:
    data = json.dumps(event, ensure_ascii=False, allow_nan=False)
    return (f"event: {event['type']}\ndata: {data}\n\n" if named else f"data: {data}\n\n").encode()
