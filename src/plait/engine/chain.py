"""Let the model look at guessed tokens, and keep of its memory what the right ones have made.

On a processor all tokens are rows of one native call; each but the first leaves the state after it in a slot of its
own, and to go back is to take the slot that belongs (model/step.py). Elsewhere each sequence's tokens are one forward
over copies of its states; if not all are right, the right ones are read once more. Keys and values of wrong tokens stay
behind the end of a sequence, where the next ones overwrite them.

Shapes   N tokens of all sequences, V vocabulary.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plait.engine.pool import Lease, Pool
from plait.model.hybrid import Hybrid
from plait.model.paged import PAGE, Rows
from plait.model.step import step_rows
from plait.ops.tape import MOST_ROWS


@dataclass(frozen=True, slots=True)
class Look:
    """One sequence: its memory, and its last token with the guesses that follow."""

    lease: Lease
    ids: Many[int]


class Looked(Protocol):
    """What came of it. logits: (N, V), of each sequence in turn."""

    logits: Tensor

    def stand(self, i: int, n: int) -> None:
        """The first n of sequence i's tokens stand, at least one; its memory becomes that after them."""
        ...


def room(pool: Pool, lease: Lease, n_tokens: int, n_rows: int) -> int:
    """Guesses that one of n_rows sequences may have: what slots, its pages and a native call have room for."""
    pages = len(lease.pages) * PAGE - n_tokens if pool.has_pages else MOST_ROWS
    share = (min(len(pool.spare), max(MOST_ROWS - n_rows, 0))) // n_rows
    return max(min(pages, share), 0)


def look(model: Hybrid, pool: Pool, looks: Many[Look]) -> Looked:
    """Feed the tokens of some sequences; each must `stand` before anything else happens to it."""
    return _Slots.of(model, pool, looks) or _Copies(model, pool, looks)


class _Slots:
    """All of them by one native call."""

    def __init__(self, pool: Pool, looks: Many[Look], slots: list[list[int]], logits: Tensor) -> None:
        self._pool, self._looks, self._slots, self.logits = pool, looks, slots, logits

    @classmethod
    def of(cls, model: Hybrid, pool: Pool, looks: Many[Look]) -> "_Slots | None":
        """None where there is no such call."""
        spare, slots = iter(pool.spare), []
        ids, reads, writes, lengths, tables = [], [], [], [], []
        for each in looks:
            # the first token stands in any case
            mine = [each.lease.slot, *(next(spare) for _ in each.ids[1:])]
            slots.append(mine)
            ids += each.ids
            reads += [mine[0], *mine[:-1]][: len(mine)]
            writes += mine
            lengths += range(each.lease.n_tokens + 1, each.lease.n_tokens + 1 + len(mine))
            tables += [each.lease.pages] * len(mine)
        logits = step_rows(model, pool.cache, ids, reads, lengths, tables, writes)
        return None if logits is None else cls(pool, looks, slots, logits)

    def stand(self, i: int, n: int) -> None:
        lease = self._looks[i].lease
        self._pool.exchange(lease, self._slots[i][n - 1])
        self._pool.note(lease, lease.n_tokens + n)


class _Copies:
    """Each by a forward over copies of its states."""

    def __init__(self, model: Hybrid, pool: Pool, looks: Many[Look]) -> None:
        self._model, self._pool, self._looks = model, pool, looks
        self._rows, parts = [], []
        for each in looks:
            rows, logits = self._fed(each, len(each.ids))
            self._rows.append(rows)
            parts.append(logits)
        self.logits = torch.cat(parts)

    def stand(self, i: int, n: int) -> None:
        each = self._looks[i]
        rows = self._rows[i] if n == len(each.ids) else self._fed(each, n)[0]
        rows.store()
        self._pool.note(each.lease, each.lease.n_tokens + n)

    def _fed(self, each: Look, n: int) -> tuple[Rows, Tensor]:
        lease = each.lease
        rows = Rows(self._pool.cache, [lease.slot], [lease.pages], [lease.n_tokens])
        ids = torch.tensor([each.ids[:n]], device=self._model.device)
        return rows, self._model(ids, cache=rows, n_logits=n).logits[0]
