"""Run sequences through a model: prompts in chunks of bounded memory, then one token per sequence and step.

Prompts of unequal length are padded on the left, so that all end in the same column; the cache remembers which
columns are padding. A sequence that is finished leaves the batch, and its rows of the cache with it.

Shapes   B sequences, L longest prompt, V vocabulary.
"""

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from plait.engine.answer import Answer
from plait.engine.request import Completion, FinishReason, Sampling, Timings, Usage
from plait.engine.sampler import Draw, sample
from plait.engine.speculate import Drafter
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid


class Row:
    """One sequence on its way: its prompt, what came out so far, and whether it goes on."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        draw: Draw,
        answer: Answer,
        end_ids: frozenset[int],
        n_cached: int = 0,
        drafter: Drafter | None = None,
    ) -> None:
        """
        Args:
            prompt: all of its ids; the first n_cached are in the cache already.
            sampling, draw, answer: its settings, randomness and text.
            end_ids: ids that finish it.
            drafter: guesses tokens of it.
        """
        self.prompt, self.sampling, self.n_cached = list(prompt), sampling, n_cached
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.thoughts: list[str] = []
        """Pieces of its text, and of its reasoning."""
        self.reason: FinishReason | None = None
        self.cache_bytes = 0
        self.error: str | None = None
        self.draw = draw
        self._answer, self._end_ids, self._drafter = answer, end_ids, drafter
        self._guessed = False
        self.begin()

    def begin(self) -> None:
        """Start its clock."""
        self._begun = self._first = self._last = time.perf_counter()

    def guess(self, ids: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow `ids`, all of the sequence: those that must come, or guesses."""
        n = min(n, self.sampling.max_tokens - len(self.ids) - 1)
        given = () if self.draw.thoughts is None else self.draw.thoughts.given
        self._guessed = self._drafter is not None and not given and n > 0
        return (
            self._drafter.propose(ids, n) if self._guessed and self._drafter is not None else list(given[: max(n, 0)])
        )

    def judge(self, n_guessed: int, n_right: int) -> None:
        """How many of the last guesses were right."""
        if self._guessed and n_guessed and self._drafter is not None:
            self._drafter.judge(n_guessed, n_right)

    @property
    def draft_bytes(self) -> int:
        """Of caches that its guesser keeps."""
        return 0 if self._drafter is None else self._drafter.n_bytes()

    def accept(self, token_id: int) -> None:
        """Take the next token: it may add text, and may finish the sequence."""
        if self.draw.failure is not None:
            self.error = self.draw.failure
            self.finish(FinishReason.ERROR)
            return
        self._last = time.perf_counter()
        if not self.ids:
            self._first = self._last
        self.ids.append(token_id)
        reasons = self.draw.thoughts is not None and self.draw.thoughts.is_open
        self.draw.note(token_id)
        if token_id in self._end_ids and not reasons:
            # an end token is counted and remembered, but it is no text
            self.finish(FinishReason.STOP)
            return
        self._show(self._answer.add(token_id))
        if self._answer.stopped:
            self.reason = FinishReason.STOP
        elif self.draw.done:
            self.finish(FinishReason.STOP)
        elif len(self.ids) == self.sampling.max_tokens:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason) -> None:
        """End it here, and let out the text that was held back; the first reason stands."""
        if self.reason is None:
            self._show(self._answer.finish())
            # what was held back may have ended in a stop text
            self.reason = FinishReason.STOP if self._answer.stopped else reason

    def _show(self, piece: tuple[str, str]) -> None:
        self.thoughts.append(piece[0])
        self.pieces.append(piece[1])

    def completion(self) -> Completion:
        """Its record, once it is finished."""
        assert self.reason is not None
        return Completion(
            text="".join(self.pieces),
            reasoning="".join(self.thoughts),
            logprobs=None if self.sampling.logprobs is None else self.draw.logprobs,
            token_ids=self.ids,
            finish_reason=self.reason,
            usage=Usage(
                prompt_tokens=len(self.prompt),
                completion_tokens=len(self.ids),
                cached_tokens=self.n_cached,
                cache_bytes=self.cache_bytes,
                reasoning_tokens=0 if self.draw.thoughts is None else self.draw.thoughts.n_tokens,
            ),
            prompt_ids=self.prompt,
            timings=Timings(prefill_s=self._first - self._begun, decode_s=self._last - self._first),
        )


def room(rows: Sequence[Row], max_context: int) -> int:
    """Tokens to reserve in a cache for these sequences: the longest prompt and its answer.

    Many ask for far more tokens than they will take: beyond the model's context, a few are enough to begin with.
    """
    longest = max(len(row.prompt) for row in rows)
    return longest + min(max(row.sampling.max_tokens for row in rows), max(max_context - longest, 1024))


def prefill(model: Hybrid, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int) -> Tensor:
    """Feed prompts to the model, at most about `chunk` tokens of them at a time.

    Args:
        model: in whose vocabulary the ids are.
        prompts: B lists of at least one id, to continue the B sequences of the cache.
        cache: extended; padding comes only before a sequence's first token, so a cache that holds tokens
            already takes prompts of one length only.
        chunk: tokens per call over all sequences, padding included; at least one of each.

    Returns: (B, V) logits after each prompt's last token.
    """
    length, width = max(map(len, prompts)), max(1, chunk // len(prompts))
    # nothing but the prompts themselves is as long as they are
    for first in range(0, length - width, width):
        ids, mask = _columns(prompts, length, first, first + width)
        model.hidden(ids.to(model.device), attention_mask=_to(mask, model), cache=cache)
    ids, mask = _columns(prompts, length, (length - 1) // width * width, length)
    return model(ids.to(model.device), attention_mask=_to(mask, model), cache=cache, n_logits=1).logits[:, 0]


def _columns(prompts: Sequence[Sequence[int]], length: int, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """Some columns of the prompts, padded on the left: (B, last - first) ids, and the mask if there is padding."""
    ids = torch.zeros(len(prompts), last - first, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        pad = length - len(prompt)
        if pad < last:
            begin = max(pad - first, 0)
            ids[row, begin:] = torch.tensor(prompt[max(first - pad, 0) : last - pad])
            mask[row, begin:] = True
    return ids, None if bool(mask.all()) else mask


def _to(mask: Tensor | None, model: Hybrid) -> Tensor | None:
    return None if mask is None else mask.to(model.device)


def decode(model: Hybrid, rows: Sequence[Row], cache: Cache, logits: Tensor) -> Generator[list[int], None, None]:
    """Draw and feed tokens until every row is finished.

    Args:
        model: as for prefill.
        rows: B sequences; each `accept`s its tokens.
        cache: theirs; holds, at the end, every token of the last row but the last one drawn.
        logits: (B, V) from prefill.

    Yields: the ids drawn in this step, before they are fed: here the caller may show text, finish rows, or leave.
    """
    rows = list(rows)
    while rows:
        ids = sample(logits, [row.draw for row in rows])
        for row, token_id in zip(rows, ids, strict=True):
            row.accept(token_id)
        yield ids
        going = [i for i, row in enumerate(rows) if row.reason is None]
        if len(going) < len(rows):
            cache_bytes = cache.n_bytes() // len(rows)
            for row in rows:
                row.cache_bytes = cache_bytes
            if not going:
                return
            cache.select(torch.tensor(going, device=model.device))
            rows, ids = [rows[i] for i in going], [ids[i] for i in going]
        step = torch.tensor(ids, device=model.device)[:, None]
        logits = model(step, cache=cache, n_logits=1).logits[:, 0]


def groups(lengths: Sequence[int], max_batch: int, slack: int) -> list[list[int]]:
    """Which prompts run together: neighbours in length, so that at most a quarter of a batch is padding.

    Args:
        lengths: tokens of each prompt.
        max_batch: sequences per group.
        slack: a group smaller than this many tokens, padding included, is never split for its padding.

    Returns: groups of indices into lengths, longest prompts first.
    """
    result: list[list[int]] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if result:
            padded = lengths[result[-1][0]] * (len(result[-1]) + 1)
            real += lengths[i]
            if len(result[-1]) < max_batch and (padded <= slack or 3 * padded <= 4 * real):
                result[-1].append(i)
                continue
        result.append([i])
        real = lengths[i]
    return result
