"""A cache of fixed size whose tensors never move: a decode step over it can be captured once and replayed.

Each sequence's keys lie from column 0 on without padding, and how many there are is a tensor on the device: what a step
does depends on no number of the host's. Fed one token per sequence at a time through `model.hidden`; prompts are read
into an ordinary cache first and taken over.

Shapes   B sequences, C room for tokens, K key/value heads, P head size.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.layers.attention import FixedKV, KVState


class StaticCache(Cache):
    """States of B sequences with room for `capacity` tokens each; lengths (B,) are counted on the device."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, batch, device=device, dtype=dtype)
        self.capacity = capacity
        for i, state in enumerate(self.states):
            if isinstance(state, KVState):
                self.states[i] = FixedKV(state, capacity)

    def extend(self, L: int, mask: Tensor | None) -> None:
        """Count one more token of every sequence; the caller sees to it that there is room.

        Raises: ValueError for several tokens at once, or padding.
        """
        if L != 1 or mask is not None:
            raise ValueError(
                f"a static cache takes one token per sequence and step, not {L}; read prompts into a Cache"
            )
        self.lengths.add_(1)

    def first(self, n: int) -> "StaticCache":
        """The first n sequences, in the same memory."""
        part = copy.copy(self)
        part.lengths = self.lengths[:n]
        part.states = []
        for state in self.states:
            part.states.append(copy.copy(state))
            if state is not None:
                part.states[-1].replace({name: t[:n] for name, t in state.tensors().items()})  # type: ignore[union-attr]
        return part

    def clear(self) -> None:
        """Forget all sequences. Keys stay where they are: no length reaches them."""
        for state in self.states:
            if state is not None and not isinstance(state, FixedKV):
                for t in state.tensors().values():
                    t.zero_()
        self.lengths.zero_()

    def take(self, cache: Cache, first: int = 0) -> None:
        """Copy all sequences of an ordinary cache, without their padding, to the places from `first` on."""
        n, room = cache.batch, cache.n_tokens
        places = slice(first, first + n)
        columns = None if cache.mask is None else [row.nonzero()[:, 0] for row in cache.mask]
        for mine, theirs in zip(self.states, cache.states, strict=True):
            if mine is None or theirs is None:
                continue
            for name, t in theirs.tensors().items():
                to = mine.tensors()[name][places]
                if not isinstance(mine, FixedKV):
                    to.copy_(t)
                elif columns is None:
                    to[:, :, :room] = t
                else:
                    for row, real in enumerate(columns):
                        to[row, :, : len(real)] = t[row].index_select(1, real)
        self.lengths[places] = cache.lengths

    def give(self, cache: Cache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Put some sequences into an ordinary cache, padded on the left, in the place of what it holds.

        Args:
            cache: of this model.
            rows: which; they become sequences 0, 1, ...
            lengths: theirs, as the host knows them.
        """
        n, room, index = len(lengths), max(lengths), torch.tensor(rows, device=self.lengths.device)
        for mine, theirs in zip(self.states, cache.states, strict=True):
            if mine is None or theirs is None:
                continue
            new = {}
            for name, t in mine.tensors().items():
                if isinstance(mine, FixedKV):
                    kept = t.new_zeros(n, t.shape[1], room, t.shape[3])
                    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                        kept[i, :, room - length :] = t[row, :, :length]
                else:
                    kept = t[index]
                new[name] = kept
            theirs.replace(new)
        cache.n_tokens, cache.lengths = room, self.lengths[index]
        pads = torch.tensor([room - length for length in lengths], device=self.lengths.device)
        columns = torch.arange(room, device=self.lengths.device)
        cache.mask = None if min(lengths) == room else columns >= pads[:, None]

    def move(self, pairs: Sequence[tuple[int, int]]) -> None:
        """For each (old, new): the sequence at place old goes to place new; old becomes free."""
        for state in self.states:
            for t in () if state is None else state.tensors().values():
                for old, new in pairs:
                    t[new] = t[old]
        for old, new in pairs:
            self.lengths[new] = self.lengths[old]
            self.lengths[old] = 0

    def used_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that the first sequences would take in an ordinary cache."""
        n, total = len(lengths), 0
        for state in self.states:
            for t in () if state is None else state.tensors().values():
                share = sum(lengths) / self.capacity if isinstance(state, FixedKV) else n
                total += round(t[0].numel() * share) * t.element_size()
        return total
