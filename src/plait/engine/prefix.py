"""Beginnings of prompts that were seen before: their keys stay in pages, their states in snapshots.

A state cannot be turned back, so a prompt can go on only from where a snapshot was taken. They are taken where others
are likely to come by:

    where a prompt parts from earlier ones     a system text that is shared, from its second use on
    shortly before the end of a prompt         the same prompt again, or a conversation told anew without its answers
    at the end of an answer                    the next turn of a conversation

The first two lie at whole pieces of the prompt (plait.engine.core says why); an answer ends where it ends, and its
last page is copied by who goes on from it. What was not used for longest goes first when there is too much of it.

Numbers  prompts are compared by the BLAKE2b digest of their pages, 16 bytes, chained.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from plait.engine.pool import Pool, Snapshot
from plait.model.paged import PAGE

# beginnings that are remembered without a snapshot, 16 bytes each and what Python adds
MOST_SEEN = 1 << 14

Key = tuple[bytes, tuple[int, ...]]
"""digest of the whole pages, and the ids after them"""


@dataclass(slots=True)
class Hits:
    """Counters: prompts that went on from a snapshot or did not, and tokens that need not be read."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0


class Beginnings:
    """All beginnings of a sequence by whole pages: ids that grow at their end, and a digest of each, made once."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self._digests = [b""]

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """For 0, 1, ... whole pages: tokens and digest of what comes before."""
        for n in range(0, len(self.ids) + 1, PAGE):
            if n == len(self._digests) * PAGE:
                page = self._digests[-1] + array("q", self.ids[n - PAGE : n]).tobytes()
                self._digests.append(hashlib.blake2b(page, digest_size=16).digest())
            yield n, self._digests[n // PAGE]


class Prefixes:
    """Snapshots by what they are of, within a budget of bytes."""

    def __init__(self, pool: Pool, n_bytes: int) -> None:
        """n_bytes: of states, and of pages that snapshots keep, each counted once; 0 keeps nothing."""
        self.pool, self.limit, self.hits = pool, n_bytes, Hits()
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        # how many tails there are behind each digest, by their length
        self._tails: dict[bytes, dict[int, int]] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._pages: dict[int, int] = {}
        self.state_bytes = 0
        """of copies of states, which lie beside the pool"""

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def n_bytes(self) -> int:
        """Bytes of states and pages."""
        return self.state_bytes + len(self._pages) * self.pool.page_bytes

    def snapshots(self) -> list[Snapshot]:
        """All of them."""
        return list(self._snapshots.values())

    def find(self, told: Beginnings) -> Snapshot | None:
        """The longest snapshot that is a beginning of these ids, but not all of them."""
        best, ids = None, told.ids
        for n, digest in told:
            for length in self._tails.get(digest, ()):
                key = digest, tuple(ids[n : n + length])
                if n + length < len(ids) and key in self._snapshots:
                    if best is None or self._snapshots[key].n_tokens > self._snapshots[best].n_tokens:
                        best = key
        if best is None:
            return None
        self._snapshots.move_to_end(best)
        return self._snapshots[best]

    def count(self, n_tokens: int) -> None:
        """A prompt has been begun, with so many tokens that need not be read."""
        self.hits.hits += n_tokens > 0
        self.hits.misses += n_tokens == 0
        self.hits.tokens += n_tokens

    def shared(self, told: Beginnings) -> int:
        """How many of a prompt's first tokens, in whole pages, some earlier prompt had too; this one is remembered."""
        known, n_shared = True, 0
        for n, digest in told:
            known = known and (n == 0 or digest in self._seen)
            if known:
                n_shared = n
            if n:
                self._seen[digest] = None
                self._seen.move_to_end(digest)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return n_shared

    def add(self, told: Beginnings, snapshot: Snapshot) -> None:
        """Keep a snapshot of a sequence of these ids; it is dropped by and by, or at once where it is known already."""
        n = snapshot.n_tokens // PAGE * PAGE
        key = next(d for at, d in told if at == n), tuple(told.ids[n : snapshot.n_tokens])
        if not self.limit or key in self._snapshots:
            self.pool.drop(snapshot)
            return
        self._snapshots[key] = snapshot
        tails = self._tails.setdefault(key[0], {})
        tails[len(key[1])] = tails.get(len(key[1]), 0) + 1
        for page in snapshot.pages:
            self._pages[page] = self._pages.get(page, 0) + 1
        self.state_bytes += snapshot.n_bytes
        while self.n_bytes > self.limit and self.forget():
            pass

    def reclaimable(self) -> int:
        """Pages that nobody but snapshots holds."""
        return sum(self.pool.users(page) == n for page, n in self._pages.items())

    def forget(self) -> bool:
        """Drop the one that was not used for longest; False if there is none."""
        if not self._snapshots:
            return False
        (digest, tail), snapshot = self._snapshots.popitem(last=False)
        tails = self._tails[digest]
        tails[len(tail)] -= 1
        if not tails[len(tail)]:
            del tails[len(tail)]
        if not tails:
            del self._tails[digest]
        for page in snapshot.pages:
            self._pages[page] -= 1
            if not self._pages[page]:
                del self._pages[page]
        self.state_bytes -= snapshot.n_bytes
        self.pool.drop(snapshot)
        return True
