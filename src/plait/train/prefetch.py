"""Prepares the batches of the next step in a thread while this one is computed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from plait.train.objective import Objective, Size

B = TypeVar("B")


@contextmanager
def draws(objective: Objective[B], first: int) -> Iterator[Iterator[tuple[Sequence[B], list[Size]]]]:
    """Micro-batches of draw `first` and of all after it, with their sizes.

    Args:
        objective: gives the batches.
        first: number of the first draw.

    Yields: an endless iterator; what goes wrong in the thread is raised by its `next`.
    """

    def make(draw: int) -> tuple[Sequence[B], list[Size]]:
        batches = objective.batches(draw)
        return batches, [objective.size(batch) for batch in batches]

    def each(pool: ThreadPoolExecutor) -> Iterator[tuple[Sequence[B], list[Size]]]:
        coming: Future[tuple[Sequence[B], list[Size]]] = pool.submit(make, first)
        draw = first
        while True:
            ready, draw = coming.result(), draw + 1
            coming = pool.submit(make, draw)
            yield ready

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        yield each(pool)
