"""What surrounds every request: an id, the key, the host, one line in the log, one count, and no error unanswered.

It also gives up readers: whoever takes nothing of an answer for a minute is gone.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.serve.door import send_json
from plait.serve.error import RequestError
from plait.serve.keys import Keys
from plait.serve.metrics import Metrics

log = logging.getLogger("plait.serve")

# these tell nothing of the model or its users; the page asks for a key itself
_OPEN = ("/", "/health", "/ready")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")
_CLOSED = 499
"""in the log: the client left before the answer was complete"""
# a reader who takes nothing for so long is gone
_PATIENCE_S = 60.0


class Surroundings(Protocol):
    """What a frame needs to know."""

    keys: Keys
    metrics: Metrics


class Frame:
    """The outermost application."""

    def __init__(
        self, app: ASGIApp, house: Surroundings, hosts: Collection[str] = (), routes: Collection[str] = ()
    ) -> None:
        """
        Args:
            app: the routes.
            house: keys and figures.
            hosts: names in the Host header that are answered; empty answers all. A page of a stranger that has its
                name point to this machine is kept out by it.
            routes: paths that figures may name; others are counted together.
        """
        self._app, self._house = app, house
        self._hosts, self._routes = frozenset(hosts), frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        note: dict[str, object] = {
            "id": given if _ID.match(given) else uuid.uuid4().hex,
            "arrived": time.perf_counter(),
        }
        scope["plait"] = note
        # the router raises what it refuses only where it believes itself inside of an application
        scope["app"] = self
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", str(note["id"]).encode())]
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            self._check(scope["path"], headers)
            await self._app(scope, receive, named)
        except ClientDisconnect:
            note["reason"], status = "disconnected", _CLOSED
        except RequestError as error:
            note["error"] = error.param or error.code or error.status
            await _refuse(error, named, begun=status != 0)
        except HTTPException as error:
            note["error"] = error.status_code
            await _refuse(_of_router(error), named, begun=status != 0)
        except Exception:
            log.exception("request %s failed", note["id"])
            note["error"] = "see above"
            fault = RequestError("a fault of the server; its log says more", status=500)
            await _refuse(fault, named, begun=status != 0)
        finally:
            self._note(scope, note, status)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._hosts and host.lower() not in self._hosts:
            raise RequestError(
                f"this server does not answer for the host {host[:64]!r}; --hosts names those it does", status=403
            )
        if path not in _OPEN:
            self._house.keys.check(headers.get("authorization"))

    def _note(self, scope: Scope, note: dict[str, object], status: int) -> None:
        arrived = note.pop("arrived")
        assert isinstance(arrived, float)
        seconds = time.perf_counter() - arrived
        route = scope["path"] if scope["path"] in self._routes else "other"
        self._house.metrics.requests.labels(route, str(status)).inc()
        self._house.metrics.whole.labels(route).observe(seconds)
        if status == 429:
            self._house.metrics.refused.inc()
        # probes come every second and would bury the rest
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") else logging.INFO
        line = {"route": route, "status": status, "seconds": round(seconds, 4)} | note
        line = {name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()}
        log.log(level, "%s", json.dumps(line))


def _of_router(error: HTTPException) -> RequestError:
    """What the router itself refuses, in OpenAI's form."""
    words = {404: "there is no such path; /openapi.json lists all", 405: "this path has no such method"}
    return RequestError(words.get(error.status_code, error.detail), status=error.status_code)


async def _refuse(error: RequestError, send: Send, begun: bool) -> None:
    if begun:
        # the status is out already; a body that ends early is all that can still be said
        return
    with suppress(ClientDisconnect):
        await send_json(send, error.to_json(), error.status, error.headers)
