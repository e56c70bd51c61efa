"""One token of every sequence of a cache by one native call: the path that decoding takes on a processor.

A tape (ops/tape.py) is written for a cache when its first token is decoded, and again when weights have moved or
modules have been replaced (ops/weights.py and ops/watch.py say what is noticed). What it cannot serve (experts, masters
rounded at each use, more than 16 rows, gradients, hooks, another device or dtype) is left to the ordinary forward.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.layers import KINDS
from plait.model.layers.attention import KVState
from plait.ops.dispatch import is_free
from plait.ops.tape import Tape
from plait.ops.watch import Watch
from plait.ops.weights import Rounded, UnfitError
from plait.precision.recipe import PrecisionRecipe

# rows of an ordinary cache that a tape serves; PyTorch's products take more
FEW = 16


class Places(Protocol):
    """What is read of a paged cache."""

    config: ModelConfig
    batch: int
    tape: tuple[object, Tape | None] | None

    @property
    def states(self) -> Sequence[object]: ...  # noqa: D102


class Model(Protocol):
    """What is read of a Hybrid."""

    @property
    def config(self) -> ModelConfig: ...  # noqa: D102
    @property
    def recipe(self) -> PrecisionRecipe: ...  # noqa: D102
    @property
    def embed(self) -> nn.Module: ...  # noqa: D102
    @property
    def blocks(self) -> nn.ModuleList: ...  # noqa: D102
    @property
    def norm(self) -> nn.Module: ...  # noqa: D102
    @property
    def head(self) -> nn.Module | None: ...  # noqa: D102
    @property
    def rounded(self) -> Rounded: ...  # noqa: D102
    def modules(self) -> Iterator[nn.Module]: ...  # noqa: D102


def step(model: Model, ids: Tensor, cache: Cache) -> Tensor | None:
    """Logits of one token per sequence, and the cache extended by it.

    Args:
        model: a Hybrid.
        ids: (B, L) int64; other than one token per row is not served.
        cache: of B sequences.

    Returns: (B, 1, V) in the compute dtype; None where the ordinary forward must serve, the cache as it was.
    """
    if not _is_plain(model, ids, cache):
        return None
    try:
        tape = _tape(model, cache)
        if tape is None:
            return None
        attending = [state for state in cache.states if isinstance(state, KVState)]
        for state in attending:
            state.grow(state.length + 1)
        tape.follow()
    except UnfitError:
        cache.tape = (model, None)
        return None
    positions = cache.lengths
    cache.extend(1, None)
    logits = tape.run(ids, positions, cache.mask, cache.n_tokens)
    for state in attending:
        state.length += 1
    return logits


def step_rows(
    model: Model,
    cache: Places,
    ids: Sequence[int],
    slots: Sequence[int],
    lengths: Sequence[int],
    tables: Sequence[Sequence[int]],
    into: Sequence[int] | None = None,
) -> Tensor | None:
    """Logits of one token for some sequences of a paged cache, their states moved on by it.

    What a sequence gets does not depend on the others, bit by bit.

    Args:
        model: a Hybrid.
        cache: where the sequences are.
        ids: the tokens, of the vocabulary.
        slots, lengths, tables: of each sequence: its slot, its tokens with the new one, the pages of these.
        into: where their states go, None for where they came from. With it, rows may be tokens of one sequence in
            their order: each reads the slot that the one before it wrote.

    Returns: (B, V) in the compute dtype; None where the ordinary forward must serve, and nothing has happened.
    """
    if torch.is_grad_enabled() or not is_free() or model.embed.weight.device.type != "cpu":  # type: ignore[union-attr]
        return None
    try:
        tape = _tape(model, cache)
        if tape is None:
            return None
        tape.follow()
    except UnfitError:
        cache.tape = (model, None)
        return None
    parts = []
    for first in range(0, len(ids), cache.batch):
        rows = range(first, min(first + cache.batch, len(ids)))
        width = max(len(tables[row]) for row in rows)
        table = [[*tables[row], *[0] * (width - len(tables[row]))] for row in rows]
        token, slot, length = (torch.tensor([of[row] for row in rows]) for of in (ids, slots, lengths))
        goal = None if into is None else torch.tensor([into[row] for row in rows])
        parts.append(tape.run_rows(token, slot, length, torch.tensor(table, dtype=torch.int32), goal))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_plain(model: Model, ids: Tensor, cache: Cache) -> bool:
    """One known id per row of a cache on a processor, and nobody asks for gradients or for a certain backend."""
    if ids.dim() != 2 or ids.shape[1] != 1 or ids.shape[0] != cache.batch or cache.batch > FEW:
        return False
    if not ids.is_cpu or ids.dtype != torch.int64 or torch.is_grad_enabled():
        return False
    # a cache of another kind keeps its keys elsewhere; one that was interrupted between tokens does not know how many
    states = (state for state in cache.states if isinstance(state, KVState))
    if type(cache) is not Cache or any(state.length != cache.n_tokens for state in states):
        return False
    if torch.compiler.is_compiling() or not is_free():
        return False
    n_ids = model.config.vocab_size
    return all(0 <= i < n_ids for (i,) in ids.tolist())


def _tape(model: Model, cache: Cache | Places) -> Tape | None:
    """The cache's tape, written now if it has none for this model as it is; None if there can be none."""
    if cache.tape is not None and cache.tape[0] is model:
        tape = cache.tape[1]
        if tape is None or (tape.batch == cache.batch and tape.is_fresh()):
            return tape
    tape = _capture(model, cache)
    if not tape.is_fresh():
        # rounded copies were there, but their masters have changed unseen
        tape = _capture(model, cache)
    cache.tape = (model, tape)
    return tape


def _capture(model: Model, cache: Cache | Places) -> Tape:
    watch = Watch(model.modules())
    if cache.config != model.config or not watch.is_ours():
        raise UnfitError
    has_places = not isinstance(cache, Cache)
    tape = Tape(cache.batch, model.recipe.compute, model.rounded, watch, has_places=has_places)
    tape.embed(model.embed)
    for block, spec, state in zip(model.blocks, model.config.layers, cache.states, strict=True):
        capture = KINDS[spec.symbol].capture
        if capture is None or spec.extras():
            raise UnfitError
        tape.begin_layer()
        capture(block.mixer, tape, block.norm, state)
    tape.linear(model.head or model.embed, tape.rows(tape.x, norm=model.norm), final=True)
    return tape
