"""How much one request, and all of them together, may ask for; and who is let in."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from plait.serve.error import RequestError

_SMALL_BODY = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """body_bytes: of a request. body_s: seconds in which it must have arrived. context: tokens of prompt and answer.
    answers: of one request, n times its prompts. default_tokens: of an answer that names no length; None is all that
    the context holds. seconds: of one request, waiting included. open: answers that run or wait at one time, beyond
    which a request is told to come again."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    context: int = 4096
    answers: int = 16
    default_tokens: int | None = None
    seconds: float = 600.0
    open: int = 96

    def __post_init__(self) -> None:
        for name in ("body_bytes", "body_s", "context", "answers", "seconds", "open"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


class Gate:
    """Counts the answers that are being made, and turns requests away when there are too many."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: answers at one time.
        """
        self.most, self.open = most, 0
        self._ended: deque[float] = deque(maxlen=64)

    @contextmanager
    def enter(self) -> Iterator["Place"]:
        """Take one place, before anything is known of the request.

        Raises: RequestError 429 if there is none.
        """
        place = Place(self)
        place.take(1)
        try:
            yield place
        finally:
            self.open -= place.n
            self._ended.append(time.monotonic())

    def retry_after(self) -> int:
        """Seconds after which a place will be free, judged by how fast they have become free of late."""
        if len(self._ended) < 2:
            return 1
        pace = (time.monotonic() - self._ended[0]) / len(self._ended)
        return min(max(round(pace * 2), 1), 60)


class Place:
    """The places that one request has."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self.n = gate, 0

    def take(self, n: int) -> None:
        """Ask for n places more.

        Raises: RequestError 429 if they are not free.
        """
        gate = self._gate
        if gate.open + n > gate.most:
            raise RequestError(
                f"all {gate.most} places are taken; come again later",
                status=429,
                code="rate_limit_exceeded",
                retry_after=gate.retry_after(),
            )
        gate.open += n
        self.n += n


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, if it is not too long and does not take too long.

    Raises: RequestError 413, 408, 415; ClientDisconnect.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type is {kind[:64]!r}, expected application/json", status=415)
    too_long = RequestError(f"the body is longer than {limits.body_bytes} bytes", status=413)
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told[:32]) > limits.body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        raise RequestError(f"the body has not arrived within {limits.body_s:g} s", status=408) from None
    return bytes(body)


async def drop_body(request: Request) -> None:
    """Read a small body that nobody wants, so that the connection may serve the next request."""
    try:
        async with asyncio.timeout(0.05):
            n = 0
            async for part in request.stream():
                n += len(part)
                if n > _SMALL_BODY:
                    return
    except (TimeoutError, ClientDisconnect):
        # the answer closes the connection instead
        return
