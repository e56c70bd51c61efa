"""One answer on its way through the engine, the handle of its request, and the pieces that come out."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from plait.engine.pool import Lease, Pool, Snapshot
from plait.engine.prefix import Beginnings
from plait.engine.request import FinishReason, Logprob, Request, Usage
from plait.engine.runner import Row
from plait.engine.session import Session
from plait.model.cache import Cache


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where the answers of a request part: the prompt as it was read, and the logits after it."""

    snapshot: Snapshot
    logits: Tensor


@dataclass(slots=True, eq=False)
class Handle:
    """A submitted request: `Engine.cancel` takes it, every Delta names it. Times are of time.perf_counter.

    session: what was seen, once it has ended, if the request keeps it. origin: while answers wait to part from it.
    """

    request: Request
    request_id: str
    submitted_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    sequences: "list[Sequence]" = field(default_factory=list)
    session: Session | None = None
    origin: Origin | None = None

    @property
    def is_done(self) -> bool:
        """Whether all of its answers have ended."""
        return all(sequence.row.reason is not None for sequence in self.sequences)

    def leave_origin(self, pool: Pool) -> None:
        """Nobody parts from it any more."""
        if self.origin is not None:
            pool.drop(self.origin.snapshot)
        self.origin = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to one answer of a request.

    index: which of its n answers. text, reasoning: of the answer and of its reasoning, "" while it is held back.
    token_ids: new ids. logprobs: of these, if asked for. finish_reason, usage: with the last piece. error: why it
    failed.
    """

    handle: Handle
    index: int = 0
    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


class Sequence:
    """One answer: its row of ids and text, where its memory is, and what of it has been given out."""

    def __init__(self, handle: Handle, index: int, row: Row, arrival: int) -> None:
        """arrival: its number among all that ever came."""
        self.handle, self.index, self.row, self.arrival = handle, index, row, arrival
        self.ids = list(row.prompt)
        """all of its tokens, those of the prompt first"""
        self.beginnings = Beginnings(self.ids)
        self.lease: Lease | None = None
        self.saved: Cache | None = None
        """its memory, while it is set aside"""
        self.marks: set[int] = set()
        """numbers of tokens at which to take snapshots"""
        self.queued_step, self.has_begun = 0, False
        self.error: str | None = None
        self._shown_ids, self._shown_pieces = 0, 0

    def __hash__(self) -> int:
        return self.arrival

    @property
    def writes(self) -> bool:
        """Whether all of its tokens have been fed, but the last one drawn."""
        return bool(self.row.ids) and self.lease is not None and self.lease.n_tokens == len(self.ids) - 1

    @property
    def beside_bytes(self) -> int:
        """Of memory that is not the pool's: its own while it is set aside, and its guesser's."""
        saved = self.saved
        return self.row.draft_bytes + (0 if saved is None else saved.n_bytes())

    def is_ready(self) -> bool:
        """Whether it can begin: the first answer of its request has read the prompt, or never will."""
        first = self.handle.sequences[0].row
        return not self.index or self.handle.origin is not None or bool(first.ids) or first.reason is not None

    def accept(self, token_id: int) -> None:
        """Take the next token."""
        self.row.accept(token_id)
        self.ids.append(token_id)

    def delta(self) -> Delta:
        """What came since the last call."""
        row = self.row
        ids, text = tuple(row.ids[self._shown_ids :]), "".join(row.pieces[self._shown_pieces :])
        reasoning = "".join(row.thoughts[self._shown_pieces :])
        told = None if row.sampling.logprobs is None else tuple(row.draw.logprobs[self._shown_ids : len(row.ids)])
        self._shown_ids, self._shown_pieces = len(row.ids), len(row.pieces)
        if ids and self.handle.first_token_s is None:
            self.handle.first_token_s = time.perf_counter()
        usage = None if row.reason is None else row.completion().usage
        return Delta(
            handle=self.handle,
            index=self.index,
            text=text,
            reasoning=reasoning,
            logprobs=told,
            token_ids=ids,
            finish_reason=row.reason,
            usage=usage,
            error=self.error or row.error,
        )
