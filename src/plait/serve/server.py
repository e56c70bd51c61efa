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
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from plait.serve.served import House, Served

log = logging.getLogger("plait.serve")

_LOOK_S = 0.05


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


class Server:
    """One application on one socket."""

    def __init__(self, house: House, app: ASGIApp, sock: socket.socket, drain_s: float = 60.0) -> None:
        """
        Args:
            house: what the application serves from.
            app: the application.
            sock: where it listens.
            drain_s: seconds in which requests may end after a signal to stop.
        """
        self._house, self._sock, self._drain_s = house, sock, drain_s
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

    def run(self, load: Callable[[], Served], opened: Callable[[Served], None] | None = None) -> None:
        """Serve until a signal or `stop`.

        Args:
            load: loads the model; called in a thread, while the server says that it is loading.
            opened: called once it is loaded.

        Raises: whatever `load` raises; RuntimeError if the engine has failed.
        """
        asyncio.run(self._run(load, opened))

    def stop(self) -> None:
        """Drain and end, from any thread."""
        self._stop.set()

    async def _run(self, load: Callable[[], Served], opened: Callable[[Served], None] | None) -> None:
        self._listen()
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._sock]))
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        try:
            while not loading.done() and not self._is_over and not serving.done():
                await asyncio.wait((loading, serving), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                served = loading.result()
                self._house.open(served)
                if opened is not None:
                    opened(served)
                await self._watch(served, serving)
        finally:
            self._uvicorn.should_exit = True
            await serving
            self._house.close()

    async def _watch(self, served: Served, serving: "asyncio.Future[None]") -> None:
        while not self._is_over and not serving.done():
            await asyncio.sleep(_LOOK_S)
            if served.worker.failure is not None:
                raise RuntimeError(f"the engine has failed: {served.worker.failure}") from served.worker.failure
        self._house.drain()
        log.info("draining: %d answers are still being made", self._house.gate.open)
        end = asyncio.get_running_loop().time() + self._drain_s
        while self._house.gate.open and self._signals < 2 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_LOOK_S)
        if self._house.gate.open:
            log.warning("%d answers are cancelled", self._house.gate.open)
            # their clients are told so by the last pieces of their streams
            await asyncio.to_thread(served.worker.close, drain=False, timeout_s=10)
            await asyncio.sleep(_LOOK_S)

    @property
    def _is_over(self) -> bool:
        return self._stop.is_set() or self._signals > 0

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        self._signals += 1
