"""A thread that runs the engine for many asynchronous readers: each request is a stream of its own.

    worker = Worker(engine)
    async for delta in worker.stream(request): ...      # leaving the loop early cancels the request at once
    worker.close()

Nobody but the thread touches the engine's batch while it lives. Readers that are slow do not hold it up: what they have
not read yet waits in their streams.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future

from plait.engine.engine import Engine
from plait.engine.request import Load, Request
from plait.engine.sequence import Delta, Handle

log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """The worker is closed, or its engine has failed."""


class Worker:
    """One engine in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        """Takes the engine's memory and starts the thread; nobody else may step the engine from now on."""
        self.engine = engine
        engine.load()
        self.failure: BaseException | None = None
        """why the thread ended, if it failed"""
        self._jobs: deque[Callable[[], None]] = deque()
        self._streams: dict[int, Callable[[Delta | BaseException], None]] = {}
        self._wake = threading.Condition()
        self._closing, self._draining = False, False
        self._thread = threading.Thread(target=self._run, name="plait-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are still taken."""
        return self._thread.is_alive() and not self._closing and self.failure is None

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        """Run a request and yield what comes of it, until all of its answers have ended.

        Closing the generator, or cancelling the task that reads it, cancels the request before the next step.

        Raises: ValueError as Engine.submit, before the first delta; WorkerError if the worker is closed or fails.
        """
        if self._closing and self.failure is None:
            raise WorkerError("the worker takes no more requests")
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def give(item: Delta | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, item)
            except RuntimeError:
                log.warning("a stream's event loop is closed; its request %s goes on unread", request.request_id)

        submitted = self._do(lambda: self._submit(request, give))
        try:
            await asyncio.shield(asyncio.wrap_future(submitted))
            left = request.n
            while left:
                item = await inbox.get()
                if isinstance(item, WorkerError):
                    raise item
                if isinstance(item, BaseException):
                    raise WorkerError(f"the engine has failed: {item}") from item
                left -= item.finish_reason is not None
                yield item
        finally:
            # the submission may still be on its way when the reader leaves
            submitted.add_done_callback(lambda future: self._forget(future))

    def call(self, job: Callable[[Engine], object]) -> "Future[object]":
        """Have the thread do something with the engine between two steps."""
        return self._do(lambda: job(self.engine))

    def load(self) -> Load:
        """The engine's counters, as they are between two steps or within one."""
        return self.engine.load()

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end the thread.

        Args:
            drain: first finish those that were taken; otherwise they are cancelled, and their streams end so.
            timeout_s: of draining, after which the rest is cancelled.

        Returns: whether the thread has ended in time.
        """
        with self._wake:
            self._closing, self._draining = True, drain
            self._wake.notify()
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._wake:
                self._draining = False
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self.engine.close()
        return True

    def _submit(self, request: Request, give: Callable[[Delta | BaseException], None]) -> Handle:
        handle = self.engine.submit(request)
        self._streams[id(handle)] = give
        return handle

    def _forget(self, submitted: "Future[Handle]") -> None:
        if submitted.cancelled() or submitted.exception() is not None:
            return
        handle = submitted.result()

        def cancel() -> None:
            self._streams.pop(id(handle), None)
            if not handle.is_done:
                self.engine.cancel(handle)

        try:
            self._do(cancel)
        except WorkerError:
            log.debug("the worker had ended before the stream")

    def _do(self, job: Callable[[], object]) -> "Future":
        future: Future = Future()

        def run() -> None:
            # who asked may have left before its turn came
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self.failure is not None or (self._closing and not self._draining) or not self._thread.is_alive():
                raise WorkerError("the worker takes no more requests") from self.failure
            self._jobs.append(run)
            self._wake.notify()
        return future

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the engine has failed")
            self.failure = error
        finally:
            with self._wake:
                jobs, self._closing, self._draining = [*self._jobs], True, False
                self._jobs.clear()
            for job in jobs:
                job()
            # none of them is stepped any more: neither those that ran nor those that came in during the last step
            for give in list(self._streams.values()):
                give(self.failure or WorkerError("the worker is closed"))

    def _turn(self) -> bool:
        """Jobs, then a step; False when it is over."""
        with self._wake:
            while not self._jobs and not self.engine.has_work() and not self._closing:
                self._wake.wait()
            jobs = [*self._jobs]
            self._jobs.clear()
        for job in jobs:
            job()
        if self._closing and not self._draining:
            self.engine.cancel_all()
        if self.engine.has_work():
            for delta in self.engine.step():
                give = self._streams.get(id(delta.handle))
                if give is not None:
                    give(delta)
        elif self._closing and not self._jobs:
            return False
        return True
