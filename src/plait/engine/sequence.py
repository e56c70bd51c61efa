"""One answer on its way through the engine, the handle of its request, and the pieces that come out."""

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from plait.engine.request import FinishReason, Request, Usage
from plait.engine.runner import Row
from plait.engine.session import Session
from plait.model.cache import Cache


@dataclass(slots=True, eq=False)
class Handle:
    """A submitted request: `Engine.cancel` takes it, every Delta names it. Times are of time.perf_counter.

    session: what was seen, once it has ended, if the request keeps it.
    """

    request: Request
    request_id: str
    submitted_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    sequences: "list[Sequence]" = field(default_factory=list)
    session: Session | None = None

    @property
    def is_done(self) -> bool:
        """Whether all of its answers have ended."""
        return all(sequence.row.reason is not None for sequence in self.sequences)


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
    logprobs: tuple[object, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


class Sequence:
    """One answer: its row of ids and text, where its cache is, and what of it has been given out."""

    def __init__(self, handle: Handle, index: int, row: Row) -> None:
        self.handle, self.index, self.row = handle, index, row
        self.cache: Cache | None = None
        self.n_seen = 0
        """tokens in the cache"""
        self._shown_ids, self._shown_pieces = 0, 0
        self.error: str | None = None

    @property
    def ids(self) -> Ids[int]:
        """All of its tokens, those of the prompt first."""
        return [*self.row.prompt, *self.row.ids]

    def delta(self) -> Delta:
        """What came since the last call."""
        row = self.row
        ids, text = tuple(row.ids[self._shown_ids :]), "".join(row.pieces[self._shown_pieces :])
        self._shown_ids, self._shown_pieces = len(row.ids), len(row.pieces)
        if ids and self.handle.first_token_s is None:
            self.handle.first_token_s = time.perf_counter()
        usage = None if row.reason is None else row.completion().usage
        return Delta(
            handle=self.handle,
            index=self.index,
            text=text,
            token_ids=ids,
            finish_reason=row.reason,
            usage=usage,
            error=self.error,
        )
