"""Asks another server on this machine over a Unix socket, and reads its answer as it comes.

One connection for one request: closing it in the middle is how the other side learns that nobody listens any more.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import h11

Headers = Sequence[tuple[bytes, bytes]]

_READ = 1 << 16
_CONNECT_S = 5.0


class UpstreamError(ConnectionError):
    """The other server cannot be reached, or has gone away in the middle of its answer."""


class Reply:
    """An answer whose body is still coming."""

    def __init__(self, connection: "_Connection", head: h11.Response) -> None:
        self._connection = connection
        self.status = head.status_code
        self.headers: Headers = list(head.headers)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, in the pieces in which it comes.

        Raises: UpstreamError if it breaks off.
        """
        while True:
            event = await self._connection.event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise UpstreamError("the answer broke off")

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.parts()])

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.CLIENT)

    async def send(self, events: Iterable[h11.Event]) -> None:
        for event in events:
            data = self._state.send(event)
            if data:
                self._writer.write(data)
        await self._writer.drain()

    async def event(self) -> object:
        while True:
            try:
                event = self._state.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._state.receive_data(await self._reader.read(_READ))
            except (OSError, h11.RemoteProtocolError) as error:
                raise UpstreamError(str(error)) from error

    def close(self) -> None:
        self._writer.close()


async def ask(path: Path, method: str, target: bytes, headers: Headers = (), body: bytes = b"") -> Reply:
    """Send a request; returns when the head of the answer is here.

    Args:
        path: of the socket.
        method, target: such as GET and b"/ready".
        headers: besides those of the connection and the length.
        body: all of it.

    Raises: UpstreamError.
    """
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError) as error:
        raise UpstreamError(f"cannot be reached: {error}") from error
    connection = _Connection(reader, writer)
    try:
        ours = [(b"host", b"localhost"), (b"connection", b"close"), (b"content-length", str(len(body)).encode())]
        request = h11.Request(method=method, target=target, headers=[*ours, *headers])
        await connection.send([request, h11.Data(data=body), h11.EndOfMessage()])
        event = await connection.event()
        while isinstance(event, h11.InformationalResponse):
            event = await connection.event()
        if not isinstance(event, h11.Response):
            raise UpstreamError("the answer is no HTTP")
        return Reply(connection, event)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError) and not isinstance(error, UpstreamError):
            raise UpstreamError(str(error)) from error
        raise
