"""The running batch: schedule, run, sample, settle; requests join and leave at every step.

What a sequence gets does not depend on the batch around it, bit by bit, on a processor. Pieces of a prompt begin at
multiples of a fixed number and are read one sequence at a time, and a token of many sequences is made by kernels that
add up each row in the same order whoever is beside it. Models that these cannot serve (model/step.py says which) run
through PyTorch's products, four rows at a time, which hold what their library holds; on a GPU nothing is promised.
Going on from the snapshot of an answer, where reading all of it anew would be the alternative, gives the same numbers
up to rounding: the one was written token by token, the other is read in pieces.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.engine.chain import Look, look, room
from plait.engine.pool import Pool
from plait.engine.prefix import Prefixes
from plait.engine.replay import Replays
from plait.engine.request import FinishReason, Load, Request
from plait.engine.runner import Row
from plait.engine.sampler import sample
from plait.engine.scheduler import Piece, Scheduler
from plait.engine.sequence import Delta, Handle, Origin, Sequence
from plait.engine.session import Session
from plait.engine.speculate import verified
from plait.model.hybrid import Hybrid
from plait.model.paged import PAGE, Rows
from plait.model.step import step_rows

# rows that PyTorch multiplies together on a processor, always so many
TILE = 4

MakeRow = Callable[[Request, int], Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much memory and work an engine takes.

    cache_bytes: for states, keys and values of all sequences. prefix_bytes: what snapshots may keep, 0 for none, None
    for a quarter of it; their pages lie in it, copies of states beside it. saved_bytes: beside it, for copies of
    sequences that are set aside, None for as much again. Caches of a smaller model that guesses lie beside it too.
    max_running: sequences in the batch. piece: tokens of a prompt per forward. step_tokens: tokens per step.
    guesses: of coming tokens that are looked at per step over all sequences (speculation); each needs a state beside.
    state, kv: numbers in which states, and keys and values, are kept, see plait.model.kept; on a processor fp32 and
    bf16 have the fast path.
    """

    cache_bytes: int = 1 << 30
    prefix_bytes: int | None = None
    saved_bytes: int | None = None
    max_running: int = 64
    piece: int = 256
    step_tokens: int = 256
    guesses: int = 0
    state: str = "fp32"
    kv: str = "auto"

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "max_running", "piece", "step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("prefix_bytes", "saved_bytes", "guesses"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")


class Core:
    """Requests of one model, step by step. Not for several threads at once."""

    def __init__(self, model: Hybrid, make_row: MakeRow, limits: Limits) -> None:
        """
        Args:
            model: any.
            make_row: gives the row of a request's answer of an index.
            limits: of memory and work.

        Raises: ValueError if the memory holds not even one sequence.
        """
        self.model, self.limits, self._make_row = model, limits, make_row
        self.pool = Pool(
            model,
            n_slots=limits.max_running,
            n_bytes=limits.cache_bytes,
            n_spare=limits.guesses,
            state_form=limits.state,
            kv_form=limits.kv,
        )
        quarter = limits.cache_bytes // 4 if limits.prefix_bytes is None else limits.prefix_bytes
        self.prefixes = Prefixes(self.pool, quarter)
        self.pool.make_room, self.pool.reclaimable = self.prefixes.forget, self.prefixes.reclaimable
        saved = limits.cache_bytes if limits.saved_bytes is None else limits.saved_bytes
        self.scheduler = Scheduler(
            self.pool, self.prefixes, piece=limits.piece, step_tokens=limits.step_tokens, saved_bytes=saved
        )
        self.replays = Replays(model, self.pool.cache)
        self._ended: list[Sequence] = []
        self._arrivals = itertools.count(1)
        self._names = itertools.count(1)
        self._prompt_tokens = self._generated = self._finished = 0
        self._guessed = self._guessed_right = 0

    # ---- requests

    def submit(self, request: Request) -> Handle:
        """Queue a request whose ids are the model's.

        Raises: ValueError for a prompt that does not fit into the cache even alone.
        """
        n, capacity = len(request.prompt_ids), self.pool.capacity
        if capacity is not None and n + 1 > capacity:
            raise ValueError(f"prompt_ids has {n} tokens; the cache holds {capacity}, the answer included")
        name = request.request_id or f"request-{next(self._names)}"
        handle = Handle(request, name, time.perf_counter())
        for index in range(request.n):
            handle.sequences.append(Sequence(handle, index, self._make_row(request, index), next(self._arrivals)))
        for sequence in handle.sequences:
            self.scheduler.add(sequence)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End what is left of a request; the next step gives its last pieces."""
        for sequence in handle.sequences:
            if sequence.row.reason is None:
                sequence.row.finish(FinishReason.CANCELLED)
                self._leave(sequence)

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return [*self.scheduler.running, *self.scheduler.aside, *self.scheduler.waiting]

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        s = self.scheduler
        return bool(s.running or s.aside or s.waiting or self._ended)

    def load(self) -> Load:
        """Counters."""
        s, (slots, all_slots), (pages, all_pages) = self.scheduler, self.pool.n_slots, self.pool.n_pages
        hits, sequences = self.prefixes.hits, self.sequences()
        # others may ask while a step is under way: what is there at one look may be gone at the next
        parting = {id(o): o.snapshot.n_bytes for q in sequences if (o := q.handle.origin) is not None}
        beside = self.prefixes.state_bytes + sum(parting.values()) + sum(q.beside_bytes for q in sequences)
        return Load(
            running=len(s.running),
            waiting=len(s.waiting),
            preempted=len(s.aside),
            slots=slots,
            slots_total=all_slots,
            pages=pages,
            pages_total=all_pages,
            page_tokens=PAGE,
            cache_bytes=(all_slots + len(self.pool.spare)) * self.pool.slot_bytes + all_pages * self.pool.page_bytes,
            beside_bytes=beside,
            steps=s.steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            finished=self._finished,
            preemptions=s.preemptions,
            peak_wait_steps=s.peak_wait_steps,
            prefix_hits=hits.hits,
            prefix_misses=hits.misses,
            prefix_tokens=hits.tokens,
            prefix_entries=len(self.prefixes),
            prefix_bytes=self.prefixes.n_bytes,
            guessed=self._guessed,
            guessed_right=self._guessed_right,
        )

    # ---- a step

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Read pieces of prompts and write a token of every answer that is past its prompt; what came of it."""
        now = time.perf_counter()
        for sequence in self.sequences():
            limit = sequence.handle.request.deadline_s
            if limit is not None and now - sequence.handle.submitted_s > limit:
                sequence.row.finish(FinishReason.TIMEOUT)
                self._leave(sequence)
        plan = self.scheduler.plan()
        came = list(plan.rows)
        if plan.rows:
            guesses = self._guesses(plan.rows)
            if any(guesses):
                self._speculate(plan.rows, guesses)
            else:
                self._settle(plan.rows, self._write(plan.rows))
        for piece in plan.pieces:
            logits = self._read(piece)
            if logits is not None:
                self._settle([piece.sequence], logits)
                came.append(piece.sequence)
        for sequence in plan.parting:
            assert sequence.handle.origin is not None
            self._settle([sequence], sequence.handle.origin.logits)
            came.append(sequence)
        deltas = [sequence.delta() for sequence in dict.fromkeys([*self._ended, *came])]
        self._ended.clear()
        return deltas

    def _write(self, rows: list[Sequence]) -> Tensor:
        """Feed the last token of each; logits (rows, V)."""
        leases = [row.lease for row in rows if row.lease is not None]
        ids, slots = [row.ids[-1] for row in rows], [lease.slot for lease in leases]
        tables, fed = [lease.pages for lease in leases], [lease.n_tokens for lease in leases]
        logits = step_rows(self.model, self.pool.cache, ids, slots, [n + 1 for n in fed], tables)
        if logits is None:
            logits = self.replays.step(ids, slots, fed, tables)
        if logits is None:
            tile = TILE if self.model.device.type == "cpu" else len(rows)
            parts = []
            for i in range(0, len(rows), tile):
                # rows that fill up the tile are nobody's
                none = tile - len(ids[i : i + tile])
                parts.append(
                    self._forward(
                        [[token] for token in ids[i : i + tile]] + [[0]] * none,
                        slots[i : i + tile] + [0] * none,
                        tables[i : i + tile] + [[0]] * none,
                        fed[i : i + tile] + [0] * none,
                    )[: tile - none]
                )
            logits = torch.cat(parts)
        for lease in leases:
            self.pool.note(lease, lease.n_tokens + 1)
        return logits

    def _guesses(self, rows: list[Sequence]) -> list[list[int]]:
        """What may follow each, as far as there is room to look at it."""
        if not self.pool.spare:
            return []
        return [
            s.row.guess(s.ids, room(self.pool, s.lease, len(s.ids), len(rows))) for s in rows if s.lease is not None
        ]

    def _speculate(self, rows: list[Sequence], guesses: list[list[int]]) -> None:
        """Feed the last token of each and the guesses after it; take tokens as long as these were right."""
        looks = [Look(s.lease, [s.ids[-1], *g]) for s, g in zip(rows, guesses, strict=True) if s.lease is not None]
        looked = look(self.model, self.pool, looks)
        taken = verified(
            looked.logits,
            guesses,
            draw=lambda some, logits: _drawn([rows[i] for i in some], logits),
            take=lambda i, token_id: self._take(rows[i], token_id),
        )
        for i, (sequence, n) in enumerate(zip(rows, taken, strict=True)):
            looked.stand(i, n)
            sequence.row.judge(len(guesses[i]), n - 1)
            self._guessed += len(guesses[i])
            self._guessed_right += n - 1
        for sequence in rows:
            self._go_on(sequence)

    def _read(self, piece: Piece) -> Tensor | None:
        """Feed a piece of a prompt; logits (1, V) if it was the last."""
        sequence, lease = piece.sequence, piece.sequence.lease
        assert lease is not None and lease.n_tokens == piece.first
        ids, is_last = sequence.ids[piece.first : piece.last], piece.last == len(sequence.ids)
        logits = self._forward([ids], [lease.slot], [lease.pages], [piece.first], n_logits=int(is_last))
        self.pool.note(lease, piece.last)
        self._prompt_tokens += len(ids)
        if piece.last in sequence.marks:
            self.prefixes.add(sequence.beginnings, self.pool.snapshot(lease))
        handle = sequence.handle
        if is_last and not sequence.row.ids and handle.origin is None and len(handle.sequences) > 1:
            handle.origin = Origin(self.pool.snapshot(lease), logits)
        return logits if is_last else None

    def _forward(
        self, ids: list[list[int]], slots: list[int], tables: list[list[int]], fed: list[int], n_logits: int = 1
    ) -> Tensor:
        rows = Rows(self.pool.cache, slots, tables, fed)
        fresh = torch.tensor(ids, device=self.model.device)
        if n_logits:
            out = self.model(fresh, cache=rows, n_logits=1).logits[:, 0]
        else:
            out, _ = self.model.hidden(fresh, cache=rows)
        rows.store()
        return out

    # ---- what came of it

    def _settle(self, rows: list[Sequence], logits: Tensor) -> None:
        for sequence, token_id in zip(rows, _drawn(rows, logits), strict=True):
            self._take(sequence, token_id)
            self._go_on(sequence)

    def _take(self, sequence: Sequence, token_id: int | None) -> bool:
        """Take a token, None where there is none; whether more may follow."""
        if token_id is None:
            sequence.error = "the model's logits are not numbers; its weights or its precision are broken"
            sequence.row.finish(FinishReason.ERROR)
        else:
            sequence.accept(token_id)
            self._generated += 1
            if self.pool.capacity is not None and len(sequence.ids) > self.pool.capacity:
                sequence.row.finish(FinishReason.LENGTH)
        return sequence.row.reason is None

    def _go_on(self, sequence: Sequence) -> None:
        if sequence.row.reason is not None:
            self._leave(sequence)
        elif sequence.index == 0 or sequence.handle.origin is not None:
            self._part(sequence.handle)

    def _part(self, handle: Handle) -> None:
        """Leave the shared prompt once every answer has begun."""
        if handle.origin is not None and all(s.row.ids or s.row.reason is not None for s in handle.sequences):
            handle.leave_origin(self.pool)

    def _leave(self, sequence: Sequence) -> None:
        """It has ended: remember what others may go on from, and give its memory back."""
        handle, lease = sequence.handle, sequence.lease
        if lease is not None:
            sequence.row.cache_bytes = self.pool.bytes_of(lease.n_tokens)
            failed = sequence.row.reason == FinishReason.ERROR
            if handle.request.keeps_session and not failed:
                handle.session = Session(() if handle.request.session is None else handle.request.session.messages)
                handle.session.ids, handle.session.cache = sequence.ids[: lease.n_tokens], self.pool.save(lease)
            if self.prefixes.limit and sequence.row.ids and not failed:
                self.prefixes.add(sequence.beginnings, self.pool.snapshot(lease))
        self.scheduler.remove(sequence)
        self._ended.append(sequence)
        self._finished += 1
        self._part(handle)
        if handle.is_done:
            handle.finished_s = time.perf_counter()


def _drawn(rows: list[Sequence], logits: Tensor) -> list[int | None]:
    """The next token of each row; None where its logits are no numbers."""
    draws = [row.row.draw for row in rows]
    try:
        return list(sample(logits, draws))
    except FloatingPointError:
        if len(rows) == 1:
            return [None]
        return [_drawn([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]
