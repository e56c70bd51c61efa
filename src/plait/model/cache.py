"""What a model remembers of a batch of sequences: one state per layer that has one.

Attention's part grows with every token; a Mamba-2 layer's has the same size after one token and after a million.

Shapes   B sequences, S tokens so far (padding included), K key/value heads, P head size, H heads, N state size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.model.config import ModelConfig
from plait.model.layer import State
from plait.model.layers import KINDS
from plait.ops.tape import Tape


class Cache:
    """States of all layers for B sequences, and which of the tokens seen were real.

    n_tokens: S, tokens seen, padding included. lengths: (B,) real tokens of each sequence. mask: (B, S) bool, or None
    while nothing was padding.
    """

    def __init__(self, config: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.states: list[State | None] = [
            KINDS[spec.symbol].state(spec, batch, device, dtype) for spec in config.layers
        ]
        self.n_tokens = 0
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.mask: Tensor | None = None
        # how model/step.py decodes with it: the model, and its tape or None where there can be none
        self.tape: tuple[object, Tape | None] | None = None

    def __getstate__(self) -> Mapping[str, object]:
        # a copy's tape would read and write the states of the original
        return self.__dict__ | {"tape": None}

    @property
    def batch(self) -> int:
        """B, sequences in it."""
        return self.lengths.shape[0]

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many tokens in all, padding included: growing later copies keys and values."""
        for state in self.states:
            if state is not None:
                state.reserve(n_tokens)

    def extend(self, L: int, mask: Tensor | None) -> None:
        """Count L more tokens, of which `mask` (B, L) says the real ones; None means all."""
        if mask is None and self.mask is None:
            self.lengths = self.lengths + L
        else:
            ones = torch.ones(self.batch, L, dtype=torch.bool, device=self.lengths.device)
            new = ones if mask is None else mask
            old = self.mask
            if old is None:
                old = torch.ones(self.batch, self.n_tokens, dtype=torch.bool, device=self.lengths.device)
            self.mask = torch.cat([old, new], 1)
            self.lengths = self.lengths + new.sum(1)
        self.n_tokens += L

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences: row i becomes what row rows[i] was."""
        for state in self.states:
            if state is not None:
                state.replace({name: t[rows] for name, t in state.tensors().items()})
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def tensors(self) -> dict[str, Tensor]:
        """Everything in it by name ("layers.0.ssm", "lengths", ...), for saving."""
        out = {
            f"layers.{i}.{name}": t
            for i, state in enumerate(self.states)
            if state is not None
            for name, t in state.tensors().items()
        }
        return out | {"lengths": self.lengths} | ({} if self.mask is None else {"mask": self.mask})

    def replace(self, tensors: dict[str, Tensor], n_tokens: int) -> None:
        """Take the contents that `tensors()` gave, for the same config.

        Raises: ValueError naming the tensor that is missing or has the wrong shape.
        """
        for i, state in enumerate(self.states):
            if state is None:
                continue
            new: dict[str, Tensor] = {}
            for name, old in state.tensors().items():
                key = f"layers.{i}.{name}"
                if key not in tensors:
                    raise ValueError(f"cache: {key} is missing; it was saved by another model")
                t = tensors[key]
                # keys and values grow with the tokens; every other size must agree
                needed = (*old.shape[:2], n_tokens, *old.shape[3:]) if name in ("k", "v") else tuple(old.shape)
                _require(key, t, needed)
                new[name] = t.to(old)
            state.replace(new)
        if "lengths" not in tensors:
            raise ValueError("cache: lengths is missing; it was not saved from a cache")
        lengths, mask = tensors["lengths"], tensors.get("mask")
        _require("lengths", lengths, (self.batch,))
        if mask is not None:
            _require("mask", mask, (self.batch, n_tokens))
        self.lengths, self.n_tokens = lengths.long(), n_tokens
        self.mask = None if mask is None else mask.bool()

    def n_bytes(self) -> int:
        """Bytes of all states; spare room for coming tokens is not counted."""
        return sum(
            t.numel() * t.element_size() for state in self.states if state is not None for t in state.tensors().values()
        )


def _require(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"cache: {name} has shape {tuple(t.shape)}, this model needs {shape}")
