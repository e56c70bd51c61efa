"""Speculation: guess the next tokens cheaply, and let the model look at all of the guesses at once.

    feed [last token, d_1 ... d_k] in one call, which reads the weights once
    at each place draw the token that belongs there, as always; go on while it is the one that was guessed

The draw at a place depends on the logits and on (seed, position) alone, so that the tokens are those that would have
come without guessing: not only the same distribution, but the same text for every seed, under penalties, constraints
and budgets too. A guess is accepted with the probability that the model gives it; for guesses without chance that is
all that any rule can accept.

Guesses come from the text itself (what followed the last few tokens when they stood there before), from a smaller model
that draws with the same random numbers, or from heads of the model's own: whatever is a Drafter. Tokens that reasoning
must close with need no guessing.

Source   Leviathan et al. 2023, arXiv:2211.17192; Saxena 2023 (prompt look-up).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from plait.engine.sampler import Draw, chosen
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid
from plait.model.layers.attention import KVState

# tokens that a smaller model reads at a time
_PIECE = 512


class Drafter(Protocol):
    """Guesses for one sequence."""

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow `ids`, all of the sequence so far; often none."""
        ...

    def judge(self, n_proposed: int, n_right: int) -> None:
        """How many of the last guesses were right."""
        ...

    def n_bytes(self) -> int:
        """Of caches that it keeps."""
        ...


class Lookup:
    """What followed the last tokens when they stood in the text before.

    It begins with few guesses, doubles them while all are right, takes back what was wrong, and after guesses none of
    which was right asks for a longer run next time: text that does not repeat itself costs little.
    """

    def __init__(self, least: int = 2, most: int = 5) -> None:
        """Args: least, most: tokens that must be the same, the longest run first."""
        self._sizes, self._least = range(most, least - 1, -1), least
        self._ends: dict[tuple[int, ...], int] = {}
        self._n_seen = 0
        self._n_wanted = 2

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Drafter."""
        # the run at the very end waits until something follows it
        for end in range(self._n_seen + 1, len(ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(ids[end - size : end])] = end
        self._n_seen = max(len(ids) - 1, self._n_seen)
        n = min(n, self._n_wanted)
        for size in self._sizes:
            at = self._ends.get(tuple(ids[-size:])) if self._least <= size <= len(ids) else None
            if at is not None:
                return self._from(ids, at, n)
        return []

    def judge(self, n_proposed: int, n_right: int) -> None:
        """As Drafter."""
        self._n_wanted = min(2 * self._n_wanted, 64) if n_right == n_proposed else max(n_right, 1)
        self._least = self._sizes[-1] if n_right else min(self._least + 1, self._sizes[0])

    def n_bytes(self) -> int:
        """As Drafter."""
        return 0

    @staticmethod
    def _from(ids: Sequence[int], at: int, n: int) -> list[int]:
        guesses = list(ids[at : at + n])
        # a text that repeats itself goes on repeating
        period = len(ids) - at
        while len(guesses) < n:
            guesses.append(guesses[len(guesses) - period])
        return guesses


class SmallModel:
    """A smaller model of the same vocabulary, which draws with the random numbers of the sequence."""

    def __init__(self, model: Hybrid, draw: Draw) -> None:
        """Args: model: the smaller one. draw: of the sequence.

        Raises: ValueError if its vocabulary is another.
        """
        self._model, self._draw = model, draw
        self._cache: Cache | None = None
        self._fed: list[int] = []

    @torch.inference_mode()
    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Drafter."""
        s, guesses = self._draw.sampling, []
        if self._cache is None or self._fed != list(ids[: len(self._fed)]):
            self._cache, self._fed = self._model.cache(1), []
        logits = self._read(list(ids[len(self._fed) :]))
        self._fed = list(ids)
        kept = _held(self._cache)
        for i in range(n):
            try:
                (token_id,) = chosen(logits, s, [(self._draw.seed, len(ids) + i)])
            except FloatingPointError:
                # a broken guesser costs time, and nothing else
                break
            guesses.append(token_id)
            if i + 1 < n:
                logits = self._read([token_id])
        _put_back(self._cache, kept)
        return guesses

    def judge(self, n_proposed: int, n_right: int) -> None:
        """As Drafter."""

    def n_bytes(self) -> int:
        """As Drafter."""
        cache = self._cache
        return 0 if cache is None else cache.n_bytes()

    def _read(self, ids: list[int]) -> Tensor:
        # the first time it is the whole prompt: in pieces its memory is bounded
        while len(ids) > _PIECE:
            self._model.hidden(torch.tensor([ids[:_PIECE]], device=self._model.device), cache=self._cache)
            ids = ids[_PIECE:]
        return self._model(torch.tensor([ids], device=self._model.device), cache=self._cache, n_logits=1).logits[:, 0]


def _held(cache: Cache) -> tuple[int, list[dict[str, Tensor] | int | None]]:
    """What a cache must be told to be again as it is: copies of states, and how many keys there are."""
    held: list[dict[str, Tensor] | int | None] = []
    for state in cache.states:
        if isinstance(state, KVState):
            held.append(state.length)
        else:
            held.append(None if state is None else {name: t.clone() for name, t in state.tensors().items()})
    return cache.n_tokens, held


def _put_back(cache: Cache, kept: tuple[int, list[dict[str, Tensor] | int | None]]) -> None:
    cache.n_tokens, held = kept
    cache.lengths = torch.full_like(cache.lengths, cache.n_tokens)
    for state, was in zip(cache.states, held, strict=True):
        if isinstance(state, KVState) and isinstance(was, int):
            state.length = was
        elif state is not None and isinstance(was, dict):
            state.replace(was)


def verified(
    logits: Tensor,
    guesses: Sequence[Sequence[int]],
    draw: Callable[[list[int], Tensor], list[int | None]],
    take: Callable[[int, int | None], bool],
) -> list[int]:
    """Draw at each place what belongs there, as long as the guess before it was right.

    Args:
        logits: (N, V): of each sequence those after its last token and after each of its guesses, one after the other.
        guesses: of each sequence.
        draw: gives the tokens of some sequences, by number, from their (n, V) logits.
        take: takes a token of a sequence; False if it has ended.

    Returns: how many tokens each sequence has taken, at least one: that many of those that were fed stand.
    """
    firsts = [sum(len(g) + 1 for g in guesses[:i]) for i in range(len(guesses))]
    n_taken, going = [0] * len(guesses), list(range(len(guesses)))
    place = 0
    while going:
        ids = draw(going, logits[[firsts[i] + place for i in going]])
        on = []
        for i, token_id in zip(going, ids, strict=True):
            n_taken[i] += 1
            if take(i, token_id) and place < len(guesses[i]) and token_id == guesses[i][place]:
                on.append(i)
        going, place = on, place + 1
    return n_taken
