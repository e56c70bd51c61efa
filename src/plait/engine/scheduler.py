"""Who runs in the next step: requests are let in, prompts get their share of tokens, and the youngest make room.

    let in    those set aside first, then by priority and arrival; nobody overtakes one that does not fit yet
    write     every answer that is being written gets one token
    read      what is left of the step's tokens goes to prompts, piece by piece: the oldest and the shortest in turns

When pages run out, snapshots go first, then the youngest sequence of the lowest priority is set aside, with a copy of
its memory if there is room for it, else to be read again. The oldest is never set aside, and one alone always fits, so
that everybody comes to an end. A request that has waited for long gains priority: it cannot be starved.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from plait.engine.pool import Pool
from plait.engine.prefix import Prefixes
from plait.engine.sequence import Sequence

# steps of waiting that are worth one priority
PATIENCE = 256


@dataclass(slots=True)
class Piece:
    """Tokens first ... last - 1 of a sequence, read in one forward."""

    sequence: Sequence
    first: int
    last: int


@dataclass(slots=True)
class Plan:
    """One step: sequences that write a token, pieces that are read, in order, and answers that part from the first."""

    rows: list[Sequence] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    parting: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Queues of one engine."""

    def __init__(self, pool: Pool, prefixes: Prefixes, *, piece: int, step_tokens: int, saved_bytes: int) -> None:
        """
        Args:
            pool, prefixes: the memory.
            piece: tokens of a prompt per forward; pieces begin at multiples of it.
            step_tokens: per step over all sequences; a step has at least one piece, if there is one to read.
            saved_bytes: for copies of sequences that are set aside; beyond, they are read again.
        """
        self.pool, self.prefixes = pool, prefixes
        self.piece, self.step_tokens, self.saved_bytes = piece, step_tokens, saved_bytes
        self.waiting: list[Sequence] = []
        self.aside: list[Sequence] = []
        self.running: list[Sequence] = []
        self.steps = self.preemptions = self.peak_wait_steps = 0
        self._oldest_is_next = True

    def add(self, sequence: Sequence) -> None:
        """Queue it."""
        sequence.queued_step = self.steps
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended: its memory is free."""
        for queue in (self.waiting, self.aside, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.lease is not None:
            self.pool.close(sequence.lease)
        sequence.lease = sequence.saved = None

    def plan(self) -> Plan:
        """The next step; pages for it are taken."""
        self.steps += 1
        self._let_in()
        rows = self._rows()
        parting = [s for s in self.running if s.lease is not None and s.lease.n_tokens == len(s.ids)]
        return Plan(rows=rows, pieces=self._pieces(self.step_tokens - len(rows)), parting=parting)

    # ---- letting in

    def _let_in(self) -> None:
        while self.pool.has_slot():
            sequence = self._next()
            if sequence is None:
                return
            if not self._open(sequence) and (self.running or not self._leave_origins() or not self._open(sequence)):
                return
            (self.aside if sequence in self.aside else self.waiting).remove(sequence)
            self.running.append(sequence)
            sequence.has_begun = True
            self.peak_wait_steps = max(self.peak_wait_steps, self.steps - 1 - sequence.queued_step)

    def _leave_origins(self) -> bool:
        """Give up shared prompts that wait for answers, which may be all that is in the way; whether there were any."""
        handles = {id(s.handle): s.handle for s in (*self.aside, *self.waiting) if s.handle.origin is not None}
        for handle in handles.values():
            handle.leave_origin(self.pool)
        return bool(handles)

    def _next(self) -> Sequence | None:
        if self.aside:
            return min(self.aside, key=self._rank)
        # an answer that shares its prompt with the first of its request waits until that has been read
        return min((s for s in self.waiting if s.is_ready()), key=self._rank, default=None)

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        waited = (self.steps - sequence.queued_step) // PATIENCE
        return -sequence.handle.request.priority - waited, sequence.arrival

    def _open(self, sequence: Sequence) -> bool:
        room = len(sequence.ids) + 1 if self.pool.capacity is None else min(len(sequence.ids) + 1, self.pool.capacity)
        origin, session = sequence.handle.origin, sequence.handle.request.session
        if sequence.saved is not None:
            sequence.lease = self.pool.take(sequence.saved, room)
        elif sequence.index and origin is not None and not sequence.row.ids:
            sequence.lease = self.pool.open(room, origin.snapshot)
        elif sequence.row.n_cached and session is not None and session.cache is not None:
            sequence.lease = self.pool.take(session.cache, room)
        else:
            return self._open_prompt(sequence, room)
        if sequence.lease is not None:
            sequence.saved = None
        return sequence.lease is not None

    def _open_prompt(self, sequence: Sequence, room: int) -> bool:
        ids = sequence.ids
        snapshot = self.prefixes.find(sequence.beginnings)
        sequence.lease = self.pool.open(room, snapshot)
        if sequence.lease is None:
            return False
        # what is read again after it was set aside was no hit of its own
        if self.prefixes.limit and not sequence.has_begun:
            begun = sequence.lease.n_tokens
            self.prefixes.count(begun)
            sequence.row.n_cached = begun
            whole = (self.prefixes.shared(sequence.beginnings), len(ids) - 1)
            sequence.marks = {n for n in (end // self.piece * self.piece for end in whole) if n > begun}
        return True

    # ---- writing

    def _rows(self) -> list[Sequence]:
        for sequence in [s for s in self.running if s.writes]:
            while sequence.lease is not None and not self.pool.grow(sequence.lease, len(sequence.ids)):
                self.set_aside(max(self.running, key=self._rank))
        return [s for s in self.running if s.writes]

    def set_aside(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it goes on later as if nothing had been."""
        assert sequence.lease is not None
        self.preemptions += 1
        n_bytes = self.pool.bytes_of(sequence.lease.n_tokens)
        taken = sum(s.saved.n_bytes() for s in self.aside if s.saved is not None)
        # what has yet to part from its prompt goes on from there again: a copy of it would lack the logits
        if 0 < sequence.lease.n_tokens < len(sequence.ids) and taken + n_bytes <= self.saved_bytes:
            sequence.saved = self.pool.save(sequence.lease)
        self.pool.close(sequence.lease)
        sequence.lease = None
        self.running.remove(sequence)
        sequence.queued_step = self.steps
        self.aside.append(sequence)

    # ---- reading

    def _pieces(self, n_tokens: int) -> list[Piece]:
        pieces: list[Piece] = []
        at = {
            s: s.lease.n_tokens
            for s in self.running
            if s.lease is not None and not s.writes and s.lease.n_tokens < len(s.ids)
        }
        while at and (n_tokens > 0 or not pieces):
            choose: Callable[[Sequence], object] = self._rank if self._oldest_is_next else lambda s: len(s.ids) - at[s]
            sequence = min(at, key=choose)  # type: ignore[type-var]
            first, end = at[sequence], len(sequence.ids)
            last = min((first // self.piece + 1) * self.piece, end)
            if pieces and last - first > n_tokens:
                break
            self._oldest_is_next = not self._oldest_is_next
            pieces.append(Piece(sequence, first, last))
            n_tokens -= last - first
            at[sequence] = last
            if last == end:
                del at[sequence]
        return pieces
