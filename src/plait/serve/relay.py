"""The application in front of a fleet: reads a request, picks a replica, hands its answer on.

A replica that dies before the first word of its answer costs nothing: another one is asked. After the first word the
client is told, in the stream, that the answer is not complete.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from plait.serve.affinity import prefixes
from plait.serve.door import attended, send_json
from plait.serve.error import RequestError
from plait.serve.fleet import Fleet, Replica
from plait.serve.keys import Keys
from plait.serve.limits import Limits, drop_body, read_body
from plait.serve.metrics import CONTENT_TYPE, Metrics
from plait.serve.upstream import Reply, UpstreamError, ask

# these belong to a connection and not to what it carries; the key has done its work here
_OURS = frozenset((b"connection", b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-request-id"))
_LARGE = 1 << 16
_SAMPLE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?", re.MULTILINE)


class Relay:
    """The application, the house of its frame, and the life of its server."""

    def __init__(self, fleet: Fleet, limits: Limits, keys: Keys, opened: Callable[[], None] | None = None) -> None:
        """
        Args:
            fleet: whom to ask.
            limits: of bodies; the replicas keep the others.
            keys: who may ask.
            opened: called when the first replica is ready.
        """
        self._opened = opened
        self._fleet, self._limits, self.keys = fleet, limits, keys
        self.metrics = Metrics(lambda: None, lambda: (self.n_open, limits.open * len(fleet.replicas)))
        self._is_draining = False

    @property
    def n_open(self) -> int:
        """Requests under way."""
        return sum(replica.open for replica in self._fleet.replicas)

    @property
    def failure(self) -> BaseException | None:
        """Why the fleet cannot go on."""
        return self._fleet.failure

    async def begin(self) -> None:
        """Start the fleet."""
        await self._fleet.begin()
        if self._opened is not None:
            self._opened()

    def drain(self) -> None:
        """Take no more requests."""
        self._is_draining = True

    async def end(self) -> None:
        """Stop the fleet."""
        await self._fleet.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        match scope["path"]:
            case "/health":
                await send_json(send, {"status": self._phase})
            case "/ready":
                ready = [replica.is_ready for replica in self._fleet.replicas]
                told = {"status": self._phase, "replicas": ready}
                await send_json(send, told, 200 if self._phase == "ready" else 503)
            case "/metrics":
                await self._metrics(send)
            case _:
                await self._forward(request, receive, send)

    @property
    def _phase(self) -> str:
        if self._is_draining:
            return "draining"
        return "ready" if any(replica.is_ready for replica in self._fleet.replicas) else "loading"

    async def _forward(self, request: Request, receive: Receive, send: Send) -> None:
        if self._phase != "ready":
            await drop_body(request)
            raise RequestError(f"the server is {self._phase}", status=503, code=self._phase, retry_after=2)
        body = b"" if request.method in ("GET", "HEAD", "OPTIONS", "DELETE") else await read_body(request, self._limits)
        await attended(receive, self._answer(request, body, send))

    async def _answer(self, request: Request, body: bytes, send: Send) -> None:
        # a long body takes a while to understand; others need not wait for that
        found = await asyncio.to_thread(prefixes, body) if len(body) > _LARGE else prefixes(body)
        if match := re.fullmatch(r"/v1/sessions/([^/]+)", request.url.path):
            found = prefixes(json.dumps({"session": match[1]}).encode())
        tried: list[int] = []
        refusal: tuple[int, Sequence[tuple[bytes, bytes]], bytes] | None = None
        while (replica := self._fleet.pick(found, tried)) is not None:
            tried.append(replica.index)
            replica.open += 1
            try:
                reply = await self._ask(replica, request, body)
                try:
                    if reply.status in (429, 503):
                        refusal = reply.status, reply.headers, await reply.body()
                        continue
                    request.scope["plait"]["replica"] = replica.index
                    await _hand_on(reply, send)
                    return
                finally:
                    reply.close()
            except UpstreamError:
                # it has died, or is about to; whoever keeps it will see
                continue
            finally:
                replica.open -= 1
        if refusal is None:
            raise RequestError("no replica could be reached", status=503, retry_after=2)
        status, headers, words = refusal
        await send({"type": "http.response.start", "status": status, "headers": _own(headers)})
        await send({"type": "http.response.body", "body": words})

    async def _ask(self, replica: Replica, request: Request, body: bytes) -> Reply:
        headers = [(name, value) for name, value in request.headers.raw if name not in _OURS]
        headers.append((b"x-request-id", str(request.scope["plait"]["id"]).encode()))
        query = request.scope["query_string"]
        path = request.scope.get("raw_path") or quote(request.url.path).encode()
        target = path.partition(b"?")[0] + (b"?" + query if query else b"")
        return await ask(replica.socket, request.method, target, headers, body)

    async def _metrics(self, send: Send) -> None:
        """Those of all replicas, each with its number, after our own."""
        ready = [replica for replica in self._fleet.replicas if replica.is_ready]
        texts = await asyncio.gather(*(_figures(replica) for replica in ready))
        body = numbered({replica.index: text for replica, text in zip(ready, texts, strict=True)}, self.metrics.text())
        headers = [(b"content-type", CONTENT_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def numbered(texts: dict[int, bytes], own: bytes) -> bytes:
    """Join figures: each family once, its samples labelled by replica; ours are those of replica "front"."""
    families: dict[bytes, list[bytes]] = {}
    for label, text in {"front": own, **{str(i): text for i, text in texts.items()}}.items():
        name = b""
        for line in text.splitlines():
            if line.startswith(b"# "):
                name = line.split(b" ", 3)[2]
                head = families.setdefault(name, [])
                # HELP and TYPE come before the samples, and once
                if line not in head:
                    head.append(line)
            elif line:
                families.setdefault(name, []).append(_SAMPLE.sub(_labelled(label.encode()), line, count=1))
    return b"".join(line + b"\n" for lines in families.values() for line in lines)


def _labelled(label: bytes):
    def labelled(found: re.Match[bytes]) -> bytes:
        return found[1] + b'{replica="' + label + (b'",' if found[2] else b'"}')

    return labelled


async def _figures(replica: Replica) -> bytes:
    try:
        async with asyncio.timeout(2):
            reply = await ask(replica.socket, "GET", b"/metrics")
            try:
                return await reply.body()
            finally:
                reply.close()
    except (UpstreamError, TimeoutError):
        return b""


async def _hand_on(reply: Reply, send: Send) -> None:
    parts = reply.parts()
    # nothing is sent before something has come: until then another replica may do it
    first = await anext(parts, b"")
    await send({"type": "http.response.start", "status": reply.status, "headers": _own(reply.headers)})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    try:
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except UpstreamError:
        if not any(name == b"content-type" and b"event-stream" in value for name, value in reply.headers):
            raise RequestError("the engine broke off", status=502) from None
        words = RequestError("the engine broke off; the answer is not complete", status=503).to_json()
        await send({"type": "http.response.body", "body": b"data: " + words + b"\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _own(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    hidden = (b"connection", b"transfer-encoding", b"date", b"x-request-id")
    return [(name, value) for name, value in headers if name.lower() not in hidden]
