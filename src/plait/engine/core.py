"""The running batch: requests join and leave at every step."""

import itertools
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from plait.engine.request import FinishReason, Load, Request
from plait.engine.runner import Row, prefill
from plait.engine.sampler import sample
from plait.engine.sequence import Delta, Handle, Sequence
from plait.engine.session import Session
from plait.model.hybrid import Hybrid

MakeRow = Callable[[Request, int], Row]


class Core:
    """Requests of one model, step by step. Not for several threads at once."""

    def __init__(self, model: Hybrid, make_row: MakeRow, max_batch: int, prefill_chunk: int) -> None:
        self.model, self._make_row = model, make_row
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._ended: list[Sequence] = []
        self._names = itertools.count(1)
        self._steps = self._prompt_tokens = self._generated = self._finished = 0

    def submit(self, request: Request) -> Handle:
        """Take a request into the queue."""
        name = request.request_id or f"request-{next(self._names)}"
        handle = Handle(request, name, time.perf_counter())
        handle.sequences = [Sequence(handle, i, self._make_row(request, i)) for i in range(request.n)]
        self._waiting.extend(handle.sequences)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End what is left of a request; the next step gives its last pieces."""
        for sequence in handle.sequences:
            self._end(sequence, FinishReason.CANCELLED)

    def cancel_all(self) -> None:
        """End all requests."""
        for sequence in [*self._waiting, *self._running]:
            self._end(sequence, FinishReason.CANCELLED)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._ended)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Read some of the prompts, or make one token of every running answer; what came of it."""
        self._steps += 1
        for sequence in [*self._waiting, *self._running]:
            limit = sequence.handle.request.deadline_s
            if limit is not None and time.perf_counter() - sequence.handle.submitted_s > limit:
                self._end(sequence, FinishReason.TIMEOUT)
        while self._waiting and len(self._running) < self.max_batch:
            sequence = self._waiting.popleft()
            self._begin(sequence)
            self._running.append(sequence)
        came = list(self._running)
        for sequence in came:
            self._advance(sequence)
        deltas = [s.delta() for s in [*self._ended, *came]]
        self._ended.clear()
        for sequence in came:
            if sequence.row.reason is not None:
                self._leave(sequence)
        return deltas

    def load(self) -> Load:
        """Counters."""
        caches = [s.cache.n_bytes() for s in self._running if s.cache is not None]
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            slots=len(self._running),
            slots_total=self.max_batch,
            cache_bytes=sum(caches),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            finished=self._finished,
        )

    def _begin(self, sequence: Sequence) -> None:
        session = sequence.handle.request.session
        sequence.row.begin()
        if sequence.row.n_cached and session is not None:
            sequence.cache, sequence.n_seen = session.cache, sequence.row.n_cached
            session.forget()
        else:
            sequence.cache = self.model.cache(1)

    def _advance(self, sequence: Sequence) -> None:
        assert sequence.cache is not None
        fed = list(sequence.ids[sequence.n_seen :])
        logits: Tensor = prefill(self.model, [fed], sequence.cache, self.prefill_chunk)
        sequence.n_seen += len(fed)
        self._prompt_tokens += len(fed) if not sequence.row.ids else 0
        try:
            (token_id,) = sample(logits, [sequence.row.draw])
            sequence.row.accept(token_id)
            self._generated += 1
        except FloatingPointError as error:
            sequence.error = str(error)
            sequence.row.finish(FinishReason.ERROR)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.row.reason is None:
            sequence.row.finish(reason)
            self._ended.append(sequence)
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        for queue in (self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)
        handle = sequence.handle
        self._finished += 1
        if sequence.cache is not None:
            sequence.row.cache_bytes = sequence.cache.n_bytes()
            if handle.request.keeps_session:
                handle.session = handle.request.session or Session()
                handle.session.ids, handle.session.cache = list(sequence.ids[: sequence.n_seen]), sequence.cache
        sequence.cache = None
        if handle.is_done:
            handle.finished_s = time.perf_counter()
