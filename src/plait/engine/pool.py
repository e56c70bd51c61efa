"""Whose memory is whose: slots of state and pages of keys and values, given and taken back together.

A sequence holds one Lease: a slot, pages, and how many tokens are in them. Only the pool changes it, so that states and
keys are always of the same tokens. Pages are counted: forks and snapshots share them, and the last one, which is not
full, is copied before it is written.

    lease = pool.open(n)                  a slot, and pages for n tokens: both, or nothing
    pool.grow(lease, n);  pool.note(lease, n)
    snapshot = pool.snapshot(lease)       a copy of the state; the pages are shared
    pool.open(n, snapshot)                goes on from there
    cache = pool.save(lease)              all of it as an ordinary cache: for sessions, and to be set aside
    pool.close(lease);  pool.drop(snapshot)
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from plait.model.cache import Cache
from plait.model.hybrid import Hybrid
from plait.model.paged import PAGE, Held, PagedCache

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Lease:
    """Memory of one sequence: the state in `slot` and the keys in `pages` are those of its first n_tokens."""

    slot: int
    pages: list[int]
    n_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A sequence as it was after n_tokens: a copy of its state, and its pages, shared."""

    n_tokens: int
    pages: tuple[int, ...]
    held: Held
    n_bytes: int
    """of the state"""


class Pool:
    """The memory of all sequences of one model."""

    def __init__(
        self,
        model: Hybrid,
        *,
        n_slots: int,
        n_bytes: int,
        n_spare: int = 0,
        state_form: str = "fp32",
        kv_form: str = "auto",
    ) -> None:
        """
        Args:
            model: whose sequences.
            n_slots: sequences at most; fewer if their states would take more than half of the bytes.
            n_bytes: for states, keys and values together.
            n_spare: slots beside, for states that may become a sequence's; fewer if they would take a quarter.
            state_form, kv_form: numbers of states, and of keys and values, see plait.model.kept.

        Raises: ValueError if not even one sequence of one page fits.
        """
        make = partial(PagedCache, model.config, dtype=model.recipe.compute, state_form=state_form, kv_form=kv_form)
        one = make(1, 1, device=torch.device("meta"))
        self.slot_bytes, self.page_bytes = one.slot_bytes, one.page_bytes
        if n_bytes < self.slot_bytes + self.page_bytes:
            raise ValueError(
                f"cache_bytes={n_bytes}: one sequence needs {self.slot_bytes} bytes of state and "
                f"{self.page_bytes} for each {PAGE} tokens"
            )
        if self.slot_bytes:
            n_spare = min(n_spare, n_bytes // 4 // self.slot_bytes)
            n_slots = max(1, min(n_slots, n_bytes // 2 // self.slot_bytes - n_spare))
        left = n_bytes - (n_slots + n_spare) * self.slot_bytes
        # where there is no attention, a page costs nothing
        n_pages = max(1, left // self.page_bytes) if self.page_bytes else 0
        self.cache = make(n_slots + n_spare, n_pages, device=model.device)
        self.has_pages = bool(self.page_bytes)
        self._n_slots, self._slots = n_slots, list(range(n_slots, 0, -1))
        self.spare = list(range(n_slots + 1, n_slots + n_spare + 1))
        """slots that are nobody's"""
        self._pages = list(range(n_pages, 0, -1))
        self._users = [0] * (n_pages + 1)
        self.make_room: Callable[[], bool] = lambda: False
        """gives up something that holds pages, such as a snapshot; False when there is nothing"""
        self.reclaimable: Callable[[], int] = lambda: 0
        """how many pages would be free if it gave up everything"""

    # ---- what there is

    @property
    def capacity(self) -> int | None:
        """Tokens that one sequence can have at most, None for any number."""
        return self.cache.n_pages * PAGE if self.has_pages else None

    @property
    def n_slots(self) -> tuple[int, int]:
        """In use, and all."""
        return self._n_slots - len(self._slots), self._n_slots

    @property
    def n_pages(self) -> tuple[int, int]:
        """In use, and all."""
        return self.cache.n_pages - len(self._pages), self.cache.n_pages

    def pages_for(self, n_tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-n_tokens // PAGE) if self.has_pages else 0

    def bytes_of(self, n_tokens: int) -> int:
        """Bytes of a sequence: constant ones, and those of its tokens' keys and values."""
        return self.slot_bytes + self.page_bytes // PAGE * n_tokens

    def has_slot(self) -> bool:
        """Whether one more sequence can be opened, if there are pages."""
        return bool(self._slots)

    # ---- giving and taking

    def open(self, n_tokens: int, snapshot: Snapshot | None = None) -> Lease | None:
        """A slot and pages for a sequence of so many tokens, from its beginning or from a snapshot of it.

        Returns: None, and nothing is taken, if there is too little.
        """
        if not self._slots:
            return None
        begun = 0 if snapshot is None else snapshot.n_tokens
        shared = [] if snapshot is None or not self.has_pages else list(snapshot.pages[: begun // PAGE])
        # what is shared must stay while room is made
        self._share(shared)
        fresh = self._take(self.pages_for(max(n_tokens, begun)) - len(shared))
        if fresh is None:
            self._give(shared)
            return None
        lease = Lease(self._slots.pop(), shared + fresh, begun)
        if snapshot is None:
            self.cache.clear(lease.slot)
        else:
            self.cache.hold(lease.slot, snapshot.held)
            if self.has_pages and begun % PAGE:
                self.cache.copy_page(snapshot.pages[begun // PAGE], fresh[0])
        return lease

    def grow(self, lease: Lease, n_tokens: int) -> bool:
        """Make room for so many tokens in all; False, and nothing is taken, if there is too little."""
        more = self._take(max(self.pages_for(n_tokens) - len(lease.pages), 0))
        if more is None:
            return False
        lease.pages.extend(more)
        return True

    def exchange(self, lease: Lease, slot: int) -> None:
        """Make the state in a spare slot the sequence's; what it had is spare. Nothing for its own slot."""
        if slot != lease.slot:
            self.spare[self.spare.index(slot)], lease.slot = lease.slot, slot

    def note(self, lease: Lease, n_tokens: int) -> None:
        """So many tokens in all have been fed."""
        assert self.pages_for(n_tokens) <= len(lease.pages) or not self.has_pages
        lease.n_tokens = n_tokens

    def close(self, lease: Lease) -> None:
        """Take the slot and the pages back."""
        assert lease.slot
        self._slots.append(lease.slot)
        self._give(lease.pages)
        lease.slot, lease.pages, lease.n_tokens = 0, [], 0

    # ---- copies

    def snapshot(self, lease: Lease) -> Snapshot:
        """What the sequence is now. Later tokens of it go into other places, or into a page that is copied."""
        pages = tuple(lease.pages[: self.pages_for(lease.n_tokens)])
        self._share(pages)
        return Snapshot(lease.n_tokens, pages, self.cache.held(lease.slot), self.slot_bytes)

    def drop(self, snapshot: Snapshot) -> None:
        """Nobody goes on from it any more."""
        self._give(snapshot.pages)

    def save(self, lease: Lease) -> Cache:
        """A copy of everything, as an ordinary cache of one sequence."""
        return self.cache.save(lease.slot, lease.pages, lease.n_tokens)

    def take(self, cache: Cache, n_tokens: int) -> Lease | None:
        """Open a sequence from such a copy, with room for so many tokens in all; None if there is too little."""
        lease = self.open(max(n_tokens, cache.n_tokens))
        if lease is not None:
            self.cache.take(lease.slot, lease.pages, cache)
            lease.n_tokens = cache.n_tokens
        return lease

    # ---- pages

    def _take(self, n: int) -> list[int] | None:
        if len(self._pages) < n and len(self._pages) + self.reclaimable() < n:
            # nothing is given up for what does not fit all the same
            return None
        while len(self._pages) < n:
            if not self.make_room():
                return None
        pages = [self._pages.pop() for _ in range(n)]
        self._share(pages)
        return pages

    def _share(self, pages: list[int] | tuple[int, ...]) -> None:
        for page in pages:
            self._users[page] += 1

    def _give(self, pages: list[int] | tuple[int, ...]) -> None:
        for page in pages:
            self._users[page] -= 1
            assert self._users[page] >= 0
            if not self._users[page]:
                self._pages.append(page)

    def users(self, page: int) -> int:
        """How many sequences and snapshots hold it."""
        return self._users[page]

    def check(self, leases: list[Lease], snapshots: list[Snapshot]) -> None:
        """Whether every slot and page is counted as often as it is held; for tests.

        Raises: AssertionError naming the slots or pages that are not.
        """
        slots = sorted([lease.slot for lease in leases] + self._slots + self.spare)
        assert slots == list(range(1, self.cache.n_slots + 1)), f"slots {slots}"
        users = [0] * (self.cache.n_pages + 1)
        for holder in (*leases, *snapshots):
            for page in holder.pages:
                users[page] += 1
        wrong = [page for page, n in enumerate(users) if n != self._users[page]]
        assert not wrong, f"pages {wrong}"
        free = [page for page, n in enumerate(users) if page and not n]
        assert sorted(self._pages) == free, f"free pages {self._pages}"
