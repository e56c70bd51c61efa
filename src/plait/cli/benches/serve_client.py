"""A client of OpenAI's protocol that asks one thing per connection, and notes when each piece of the answer came.

Written on asyncio's streams alone, so that it takes little of a processor that it shares with the server it measures.
Times are of time.perf_counter.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

REFUSED = "refused"
"""how an answer of status 429 or 503 is counted"""
_LIMIT = 1 << 22


# how servers are told not to end an answer before its time: fields by the number of tokens wanted
DIALECTS: dict[str, Callable[[int], dict[str, object]]] = {
    "ignore_eos": lambda n: {"ignore_eos": True},
    "generation_config": lambda n: {"generation_config": json.dumps({"min_new_tokens": n})},
    "none": lambda n: {},
}


class ServerError(RuntimeError):
    """The server answers, but not what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server. url: with or without /v1. name: in the report. model: what it calls it. api: "chat" or "completions".
    dialect: one of DIALECTS. patience_s: after which an answer is given up."""

    url: str
    name: str
    model: str = ""
    key: str = ""
    api: str = "chat"
    dialect: str = "none"
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url!r}: give an address such as http://127.0.0.1:8000")


@dataclass(slots=True, kw_only=True)
class Heard:
    """What came back, and when. due_s: when it should have been asked. tokens: new ones, as the server counts, or else
    pieces. error: "" or what went wrong, in a word."""

    due_s: float
    sent_s: float = 0.0
    pieces_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    status: int = 0
    error: str = ""


async def get(target: Target, path: str) -> dict[str, object]:
    """A JSON object of the server.

    Raises: ServerError or OSError if there is none.
    """
    async with asyncio.timeout(30):
        status, body = await _whole(target, "GET", path)
    if status != 200:
        raise ServerError(f"{target.url}: GET {path} gave {status}: {body[:200]!r}")
    return json.loads(body)


async def hear(target: Target, prompt: str, max_tokens: int, due_s: float = 0.0) -> Heard:
    """Ask, and listen to the end. Never raises for what the server or the network does: that is what is measured."""
    heard = Heard(due_s=due_s or time.perf_counter())
    heard.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(target.patience_s):
            await _listen(target, _body(target, prompt, max_tokens), heard)
        if not heard.error and not heard.pieces_s:
            heard.error = "empty"
    except TimeoutError:
        heard.error = "timeout"
    except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        heard.error = f"connection: {type(error).__name__}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        heard.error = f"not the protocol: {error}"
    heard.ended_s = time.perf_counter()
    heard.tokens = heard.tokens or len(heard.pieces_s)
    return heard


def _body(target: Target, prompt: str, max_tokens: int) -> dict[str, object]:
    said = {"messages": [{"role": "user", "content": prompt}]} if target.api == "chat" else {"prompt": prompt}
    how: dict[str, object] = {"model": target.model, "max_tokens": max_tokens, "temperature": 0.0, "stream": True}
    how["stream_options"] = {"include_usage": True}
    return {**said, **how, **DIALECTS[target.dialect](max_tokens)}


async def _listen(target: Target, body: dict[str, object], heard: Heard) -> None:
    path = "/v1/chat/completions" if target.api == "chat" else "/v1/completions"
    async with _Connection(target) as connection:
        await connection.send("POST", path, json.dumps(body).encode())
        heard.status = await connection.head()
        if heard.status != 200:
            words = b"".join([part async for part in connection.body()])[:300].decode(errors="replace")
            heard.text, heard.error = words, REFUSED if heard.status in (429, 503) else f"status {heard.status}"
            return
        has_ended = False
        async for line in _lines(connection.body()):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            has_ended = _take(heard, json.loads(data)) or has_ended
            if heard.error:
                return
    if not has_ended:
        heard.error = "cut off"


def _take(heard: Heard, event: dict) -> bool:
    """Note what an event tells; whether the answer says that it is complete."""
    has_ended = False
    if event.get("error"):
        heard.error = f"error: {str(event['error'])[:100]}"
        return has_ended
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        text = (delta.get("content") or delta.get("text") or "") + (delta.get("reasoning_content") or "")
        has_ended = has_ended or bool(choice.get("finish_reason"))
        if text:
            heard.pieces_s.append(time.perf_counter())
            heard.text += text
    usage = event.get("usage")
    if usage:
        heard.tokens = usage.get("completion_tokens") or 0
        heard.prompt_tokens = usage.get("prompt_tokens") or 0
        heard.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return has_ended


async def _whole(target: Target, method: str, path: str) -> tuple[int, bytes]:
    async with _Connection(target) as connection:
        await connection.send(method, path, b"")
        status = await connection.head()
        return status, b"".join([part async for part in connection.body()])


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if held:
        yield held


class _Connection:
    """One request and its answer, in HTTP/1.1."""

    def __init__(self, target: Target) -> None:
        self._target, self._parts = target, urlsplit(target.url)
        self._headers: dict[str, str] = {}

    async def __aenter__(self) -> "_Connection":
        secure = ssl.create_default_context() if self._parts.scheme == "https" else None
        port = self._parts.port or (443 if secure else 80)
        self._reader, self._writer = await asyncio.open_connection(self._parts.hostname, port, ssl=secure, limit=_LIMIT)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def send(self, method: str, path: str, body: bytes) -> None:
        base = self._parts.path.rstrip("/").removesuffix("/v1")
        lines = [
            f"{method} {base}{path} HTTP/1.1",
            f"Host: {self._parts.netloc}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self._target.key:
            lines.append(f"Authorization: Bearer {self._target.key}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self._writer.drain()

    async def head(self) -> int:
        """The status."""
        first = await self._reader.readline()
        if not first:
            raise EOFError("the server closed the connection")
        while (line := (await self._reader.readline()).strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            self._headers[name.lower()] = value.strip()
        return int(first.split()[1])

    async def body(self) -> AsyncIterator[bytes]:
        """Its parts, as they come."""
        if "chunked" in self._headers.get("transfer-encoding", ""):
            while n := int((await self._reader.readline()).split(b";")[0] or b"0", 16):
                yield await self._reader.readexactly(n)
                await self._reader.readline()
            return
        left = int(self._headers.get("content-length", -1))
        while left and (part := await self._reader.read(1 << 16)):
            left -= len(part) if left > 0 else 0
            yield part
