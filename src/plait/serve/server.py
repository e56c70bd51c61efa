"""Runs the application: binds at once, loads the model behind it, and on SIGTERM finishes what was begun.

    bind -> loading (503, /ready says so) -> ready -> SIGTERM: draining (503 for new requests) -> the rest ends -> exit

A second signal, or the end of the time for draining, cancels what still runs.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from plait.engine.worker import Worker
from plait.serve.served import House, Served

log = logging.getLogger("plait.serve")

_LOOK_S = 0.05
_SWITCH_S = 0.0005


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # a signal means draining first, which is ours to do
        yield


def bind(host: str, port: int, path: Path | None = None) -> socket.socket:
    """Open the listening socket, so that a wrong address is told before a model is loaded.

    Args:
        host, port: of TCP; port 0 takes a free one.
        path: of a Unix socket instead.

    Raises: ValueError, OSError.
    """
    if path is not None:
        found = socket.socket(socket.AF_UNIX)
        found.bind(str(path))
        os.chmod(path, 0o600)
        return found
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port}: ports run from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: {error.strerror}") from None
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(f"--port {port} of {host}: {error.strerror}; choose another with --port") from None
    return found


def address_of(found: socket.socket) -> str:
    """The URL of a listening socket."""
    if found.family == getattr(socket, "AF_UNIX", None):
        return f"unix:{found.getsockname()}"
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Life(Protocol):
    """What a server runs: a model, or a fleet of others that do."""

    @property
    def n_open(self) -> int:
        """Answers that are being made."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """Why it cannot go on, None while it can."""
        ...

    async def begin(self) -> None:
        """Load; the server answers already, and says that it is loading. May raise, which ends the server."""
        ...

    def drain(self) -> None:
        """Take no more requests."""
        ...

    async def end(self) -> None:
        """Break off what is left, tell its clients, and let go of everything."""
        ...


class Alone:
    """A model in this process."""

    def __init__(
        self, house: House, load: Callable[[], Served], opened: Callable[[Served], None] | None = None
    ) -> None:
        """
        Args:
            house: opened with the model.
            load: loads it; called in a thread.
            opened: called then.
        """
        self._house, self._load, self._opened = house, load, opened
        self._worker: Worker | None = None

    @property
    def n_open(self) -> int:
        return self._house.gate.open

    @property
    def failure(self) -> BaseException | None:
        return None if self._worker is None else self._worker.failure

    async def begin(self) -> None:
        served = await asyncio.to_thread(self._load)
        self._worker = served.worker
        self._house.open(served)
        if self._opened is not None:
            self._opened(served)

    def drain(self) -> None:
        self._house.drain()

    async def end(self) -> None:
        await asyncio.to_thread(self._house.close)


class Server:
    """One application on one socket."""

    def __init__(self, life: Life, app: ASGIApp, sock: socket.socket, drain_s: float = 60.0) -> None:
        """
        Args:
            life: what the application asks.
            app: the application.
            sock: where it listens.
            drain_s: seconds in which requests may end after a signal to stop.
        """
        self._life, self._sock, self._drain_s = life, sock, drain_s
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=1 << 16,
        )
        self._uvicorn = _Uvicorn(config)
        self._signals = 0
        self._stop = threading.Event()
        # a replica whose fleet has been killed must not stay behind
        self._parent = os.environ.get("PLAIT_PARENT")

    def run(self) -> None:
        """Serve until a signal or `stop`.

        Raises: whatever stops the life: bad input while it begins, or its failure.
        """
        # the engine's thread and this one share Python's lock: whoever asks for it waits so long, at every turn of the
        # event loop, and a refusal takes several turns
        sys.setswitchinterval(_SWITCH_S)
        asyncio.run(self._run())

    def stop(self) -> None:
        """Drain and end, from any thread."""
        self._stop.set()

    async def _run(self) -> None:
        self._listen()
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._sock]))
        beginning = asyncio.ensure_future(self._life.begin())
        try:
            while not beginning.done() and not self._is_over and not serving.done():
                await asyncio.wait((beginning, serving), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                beginning.result()
                await self._watch(serving)
        finally:
            beginning.cancel()
            # clients of what is broken off are told so by the last pieces of their streams
            await self._life.end()
            await asyncio.sleep(_LOOK_S)
            self._uvicorn.should_exit = True
            await serving

    async def _watch(self, serving: "asyncio.Future[None]") -> None:
        while not self._is_over and not serving.done():
            await asyncio.sleep(_LOOK_S)
            if self._life.failure is not None:
                raise RuntimeError(f"the engine has failed: {self._life.failure}") from self._life.failure
        self._life.drain()
        log.info("draining: %d answers are still being made", self._life.n_open)
        end = asyncio.get_running_loop().time() + self._drain_s
        while self._life.n_open and self._signals < 2 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_LOOK_S)
        if self._life.n_open:
            log.warning("%d answers are broken off", self._life.n_open)

    @property
    def _is_over(self) -> bool:
        is_orphan = self._parent is not None and str(os.getppid()) != self._parent
        return self._stop.is_set() or self._signals > 0 or is_orphan

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        self._signals += 1
