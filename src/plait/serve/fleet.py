"""Several engines behind one address: starts a process for each, sends every request to one, replaces those that die.

The processes are ordinary servers that listen on Unix sockets in a folder that only we can enter. Why a process of ours
in front, and not one port that the system shares out (SO_REUSEPORT): the system deals out connections, not requests,
and blindly; clients keep connections open, and a prefix that one replica knows would be read anew by another.
"""

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.serve.affinity import Memory
from plait.serve.upstream import UpstreamError, ask

log = logging.getLogger("plait.serve")

_LOOK_S = 0.2
# a replica that says nothing for so long hangs
_SILENT_S = 60.0
_LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class Replica:
    """One process. open: requests that it has. was_ready: since it was started last."""

    index: int
    socket: Path
    process: asyncio.subprocess.Process | None = None
    is_ready: bool = False
    was_ready: bool = False
    open: int = 0
    restarts: int = 0
    heard: float = 0.0


class Fleet:
    """All replicas."""

    def __init__(self, command: Callable[[int, Path], Sequence[str]], n: int, threads: int) -> None:
        """
        Args:
            command: words that start a replica, from its number and its socket.
            n: how many.
            threads: of each, where the environment does not say.
        """
        self._command, self._threads = command, threads
        self._folder = Path(tempfile.mkdtemp(prefix="plait-"))
        self.replicas = [Replica(i, self._folder / f"{i}.sock") for i in range(n)]
        self.memory = Memory()
        self.failure: BaseException | None = None
        self._is_ending = False
        self._keepers: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Start all; returns when the first one is ready.

        Raises: RuntimeError if one ends before it was ever ready, which others of its kind would do as well.
        """
        self._keepers = [asyncio.create_task(self._keep(replica)) for replica in self.replicas]
        while not any(replica.is_ready for replica in self.replicas):
            await asyncio.sleep(_LOOK_S)
            if self.failure is not None:
                raise self.failure

    def pick(self, found: Sequence[bytes], tried: Sequence[int] = ()) -> Replica | None:
        """The replica for a request, by its beginnings; None if all that are ready were tried."""
        busy = {r.index: r.open for r in self.replicas if r.is_ready and r.index not in tried}
        return self.replicas[self.memory.choose(found, busy)] if busy else None

    async def end(self, timeout_s: float = 15.0) -> None:
        """Stop all."""
        self._is_ending = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(self._stop(replica, timeout_s) for replica in self.replicas))
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _keep(self, replica: Replica) -> None:
        pause = 1.0
        while True:
            await self._start(replica)
            assert replica.process is not None
            while replica.process.returncode is None:
                await self._look(replica)
                await asyncio.sleep(_LOOK_S)
            status, replica.is_ready = replica.process.returncode, False
            self.memory.forget(replica.index)
            if not replica.was_ready and replica.restarts == 0:
                self.failure = RuntimeError(f"replica {replica.index} ended with status {status}; its words are above")
                return
            pause = 1.0 if replica.was_ready else min(2 * pause, _LONGEST_PAUSE_S)
            log.error("replica %d ended with status %d; it is started again in %.0f s", replica.index, status, pause)
            await asyncio.sleep(pause)
            replica.restarts += 1

    async def _start(self, replica: Replica) -> None:
        replica.socket.unlink(missing_ok=True)
        replica.was_ready, replica.heard = False, time.monotonic()
        settings = {"PLAIT_PARENT": str(os.getpid()), "OMP_NUM_THREADS": str(self._threads)}
        # a Ctrl-C of the terminal is for us; they are told when all is drained
        replica.process = await asyncio.create_subprocess_exec(
            *self._command(replica.index, replica.socket),
            env=settings | dict(os.environ) | {"PLAIT_PARENT": settings["PLAIT_PARENT"]},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _look(self, replica: Replica) -> None:
        """Whether it is ready; one that hangs is killed."""
        try:
            async with asyncio.timeout(_SILENT_S / 4):
                reply = await ask(replica.socket, "GET", b"/ready")
                reply.close()
            replica.is_ready, replica.heard = reply.status == 200, time.monotonic()
            replica.was_ready |= replica.is_ready
        except (UpstreamError, TimeoutError):
            # before its first word it imports its libraries
            replica.is_ready = replica.is_ready and time.monotonic() - replica.heard < _SILENT_S / 4
            if replica.was_ready and time.monotonic() - replica.heard > _SILENT_S:
                log.error("replica %d hangs and is killed", replica.index)
                _signal(replica, signal.SIGKILL)

    async def _stop(self, replica: Replica, timeout_s: float) -> None:
        if replica.process is None:
            return
        _signal(replica, signal.SIGTERM)
        try:
            await asyncio.wait_for(replica.process.wait(), timeout_s)
        except TimeoutError:
            _signal(replica, signal.SIGKILL)
            await replica.process.wait()


def _signal(replica: Replica, number: signal.Signals) -> None:
    try:
        if replica.process is not None and replica.process.returncode is None:
            replica.process.send_signal(number)
    except ProcessLookupError:
        # it has ended by itself
        return
