"""A tensor that is read only when needed: a shape over runs of numbers that lie in files or in memory.

Most differences between checkpoint formats are then plain data: another name is another key, a stack of experts is
their runs one after the other, one expert is a part of a run, an axis of size one is another shape over the same run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

# large enough for full disk speed, small enough to be nothing beside a model
BLOCK_BYTES = 32 << 20


class Source(Protocol):
    """Numbers of one dtype in a row."""

    def read(self, start: int, count: int) -> Tensor:
        """(count,) numbers from `start` on; a view that is valid until `drop`."""
        ...

    def drop(self, start: int, count: int) -> None:
        """Those numbers are no longer needed in memory."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """`count` numbers of a source, from `start` on."""

    source: Source
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Held:
    """A source in memory: the numbers of a tensor, on any device."""

    flat: Tensor

    def read(self, start: int, count: int) -> Tensor:
        return self.flat[start : start + count]

    def drop(self, start: int, count: int) -> None:
        """Nothing to do: the tensor belongs to somebody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """shape and dtype as they will be read; the runs may hold another dtype and are cast on the way."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @staticmethod
    def of(tensor: Tensor) -> "LazyTensor":
        """The lazy form of a tensor in memory, which must not change before it is read."""
        tensor = tensor.detach().contiguous()
        run = Run(Held(tensor.view(-1)), 0, tensor.numel())
        return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, runs=(run,))

    @staticmethod
    def stack(parts: "Sequence[LazyTensor]") -> "LazyTensor":
        """Equal shapes one after the other along a new first axis; mixed dtypes are promoted."""
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        runs = tuple(run for part in parts for run in part.runs)
        return LazyTensor(shape=(len(parts), *parts[0].shape), dtype=dtype, runs=runs)

    @property
    def n_bytes(self) -> int:
        """Bytes when read."""
        return prod(self.shape) * self.dtype.itemsize

    def reshaped(self, shape: tuple[int, ...]) -> "LazyTensor":
        """The same numbers in another shape."""
        return replace(self, shape=shape)

    def cast(self, dtype: torch.dtype) -> "LazyTensor":
        """The same numbers, rounded to another dtype when read."""
        return replace(self, dtype=dtype)

    def row(self, index: int) -> "LazyTensor":
        """Entry `index` of the first axis."""
        return self.rows(index, 1).reshaped(self.shape[1:])

    def rows(self, first: int, n: int) -> "LazyTensor":
        """`n` entries of the first axis."""
        count = prod(self.shape[1:])
        skip, left, runs = first * count, n * count, []
        for run in self.runs:
            if skip < run.count and left:
                taken = min(left, run.count - skip)
                runs.append(Run(run.source, run.start + skip, taken))
                left -= taken
            skip = max(skip - run.count, 0)
        return LazyTensor(shape=(n, *self.shape[1:]), dtype=self.dtype, runs=tuple(runs))

    def blocks(self) -> Iterator[Tensor]:
        """The numbers in order, as (n,) tensors of at most BLOCK_BYTES; each is valid until the next is asked for."""
        step = BLOCK_BYTES // max(self.dtype.itemsize, 1)
        for run in self.runs:
            for start in range(run.start, run.start + run.count, step):
                count = min(step, run.start + run.count - start)
                yield run.source.read(start, count).to(self.dtype)
                run.source.drop(start, count)

    def copy_to(self, out: Tensor) -> None:
        """Fill a contiguous tensor of this shape, of any dtype, on any device."""
        flat, at = out.view(-1), 0
        for block in self.blocks():
            flat[at : at + block.numel()].copy_(block)
            at += block.numel()

    def read(self) -> Tensor:
        """All of it, as a new tensor on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(out)
        return out
