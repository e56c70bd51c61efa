"""What cutting a model does to one axis of one tensor: entries are taken, scaled or added up, lazily.

    new[i] = sum over j of weight[i, j] old[j]

A cut only takes: each new entry is one old entry, and the numbers stay the same bits. Twins that are merged add up, and
norms are rescaled; such sums are formed in float32 (float64 for float64) and rounded to the tensor's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from plait.formats.computed import computed
from plait.formats.tensors import LazyTensor

# numbers of a tensor that are computed at a time
AT_ONCE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A sparse matrix from old entries to n new ones: weight[k] at (new[k], old[k]), new in ascending order."""

    n: int
    new: Tensor
    old: Tensor
    weight: Tensor

    @staticmethod
    def take(index: Tensor) -> "Edit":
        """The old entries `index` (n,), in this order."""
        return Edit(n=len(index), new=torch.arange(len(index)), old=index, weight=torch.ones(len(index)).double())

    @staticmethod
    def scale(weight: Tensor) -> "Edit":
        """Every entry times its weight (n,)."""
        every = torch.arange(len(weight))
        return Edit(n=len(weight), new=every, old=every, weight=weight.double())

    def then(self, later: "Edit") -> "Edit":
        """Both in one: first this, then `later`."""
        if self.only_takes and later.only_takes:
            return Edit.take(self.old[later.old])
        counts = self.new.bincount(minlength=self.n)
        n = counts[later.old]
        # each entry of `later` meets all of ours that make what it reads
        which = torch.arange(len(n)).repeat_interleave(n)
        mine = torch.arange(len(which)) - (n.cumsum(0) - n)[which] + (counts.cumsum(0) - counts)[later.old[which]]
        weight = later.weight[which] * self.weight[mine]
        return Edit(n=later.n, new=later.new[which], old=self.old[mine], weight=weight)

    @property
    def only_takes(self) -> bool:
        """Whether each new entry is one old entry."""
        return len(self.new) == self.n and bool(((self.weight == 1) & (self.new == torch.arange(self.n))).all())

    def changes(self, n_old: int) -> bool:
        """Whether it is anything but the identity on n_old entries."""
        return not (self.only_takes and self.n == n_old and bool((self.old == torch.arange(n_old)).all()))

    def apply(self, t: Tensor, dim: int) -> Tensor:
        """t with its entries along `dim` replaced by the new ones."""
        if self.only_takes:
            return t.index_select(dim, self.old)
        wide = torch.promote_types(t.dtype, torch.float32)
        shape = [1] * t.dim()
        shape[dim] = -1
        parts = t.index_select(dim, self.old).to(wide) * self.weight.to(wide).view(shape)
        out = torch.zeros([self.n if i == dim else size for i, size in enumerate(t.shape)], dtype=wide)
        return out.index_add_(dim, self.new, parts).to(t.dtype)

    def rows(self, first: int, n: int) -> "tuple[Edit, Tensor]":
        """New entries first .. first + n alone, over those old entries that they need, which come second, sorted."""
        chosen = (self.new >= first) & (self.new < first + n)
        needed, old = self.old[chosen].unique(return_inverse=True)
        return Edit(n=n, new=self.new[chosen] - first, old=old, weight=self.weight[chosen]), needed


def edited(tensor: LazyTensor, edits: Mapping[int, Edit]) -> LazyTensor:
    """A tensor with edits along some of its axes, made when it is read; itself if they change nothing."""
    edits = {dim: edit for dim, edit in edits.items() if edit.changes(tensor.shape[dim])}
    if not edits:
        return tensor
    if list(edits) == [0] and edits[0].only_takes:
        pieces = [tensor.rows(first, n) for first, n in _runs(edits[0].old)]
        runs = tuple(run for piece in pieces for run in piece.runs)
        return LazyTensor(shape=(edits[0].n, *tensor.shape[1:]), dtype=tensor.dtype, runs=runs)
    shape = tuple(edits[dim].n if dim in edits else size for dim, size in enumerate(tensor.shape))
    first_edit = edits.get(0, Edit.take(torch.arange(tensor.shape[0])))
    others = {dim: edit for dim, edit in edits.items() if dim}

    def make(first: int, n: int) -> Tensor:
        here, needed = first_edit.rows(first, n)
        t = torch.cat([tensor.rows(begin, count).read() for begin, count in _runs(needed)])
        t = here.apply(t, 0)
        for dim, edit in others.items():
            t = edit.apply(t, dim)
        return t

    return computed(shape, tensor.dtype, make, max(AT_ONCE // max(prod(tensor.shape[1:]), 1), 1))


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """Ranges (first, count) of consecutive numbers that an index consists of."""
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero()[:, 0] + 1
    starts = [0, *breaks.tolist(), len(index)]
    return [(int(index[a]), b - a) for a, b in zip(starts[:-1], starts[1:], strict=True)]
