"""Tensors of a checkpoint that are computed from others as they are read, some rows at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from plait.formats.tensors import LazyTensor, Run

# (first row, number of rows) -> these rows
Make = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A source of some rows."""

    make: Make
    first: int
    n: int

    def read(self, start: int, count: int) -> Tensor:
        for rows, made in tuple(_made):
            if rows is self:
                return made[start : start + count]
        made = self.make(self.first, self.n).flatten()
        _made[:] = [(self, made)]
        return made[start : start + count]

    def drop(self, start: int, count: int) -> None:
        _made[:] = [(rows, made) for rows, made in _made if rows is not self or start + count < made.numel()]


# what was made last: large tensors are read in pieces, which would each make all of it again
_made: list[tuple[_Rows, Tensor]] = []


def computed(shape: tuple[int, ...], dtype: torch.dtype, make: Make, rows_at_once: int = 0) -> LazyTensor:
    """A tensor that is made when it is read; of all of them one at a time is kept, until it was read to its end.

    Args:
        shape, dtype: of it.
        make: gives rows of it, in this dtype.
        rows_at_once: how many to ask for; 0 for all of them.
    """
    height, each = shape[0], prod(shape[1:])
    step = rows_at_once or height
    heights = {row: min(step, height - row) for row in range(0, height, step)}
    runs = tuple(Run(_Rows(make, row, n), 0, n * each) for row, n in heights.items())
    return LazyTensor(shape=shape, dtype=dtype, runs=runs)
