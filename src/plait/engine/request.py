"""What one asks of the engine, and what it gives back: sampling settings and completions, as plain records."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    max_tokens: at most so many new tokens. temperature: 0 takes the likeliest token (greedy), 1 the model's own
    distribution. top_k: only the k likeliest. top_p: only the likeliest that together hold this probability.
    min_p: only those at least this fraction as likely as the likeliest. repetition_penalty: above 1 makes tokens of
    the prompt and the answer less likely. seed: the same seed gives the same tokens, whatever else runs in the batch;
    None draws one. stop: texts that end the answer and are not part of it. stop_ids: token ids that do, besides the
    model's own. ignore_eos: run on past the model's own end ids.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "from 0 (greedy)")
        _number("repetition_penalty", self.repetition_penalty, lambda x: 0 < x < math.inf, "above 0")
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            _number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.min_p is not None:
            _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        # a bare text or a list is what people write; kept as tuples, so that settings stay hashable
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r}: expected texts of at least one character")
        stop_ids = tuple(self.stop_ids)
        for token_id in stop_ids:
            _whole("stop_ids", token_id, 0)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", stop_ids)


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """an end id, a stop id or a stop text"""
    LENGTH = "length"
    """max_tokens were made"""
    CANCELLED = "cancelled"
    """the reader of the stream left"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one completion.

    prompt_tokens: all of the prompt; cached_tokens: those of them that a session had seen already.
    completion_tokens: new ones, an end id included. cache_bytes: what this sequence's cache held at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from the start of the batch to its first tokens, and from there to this sequence's last token."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer.

    text: without end tokens and stop texts; "" where there is no tokenizer. token_ids: all new ids, an end id
    included. prompt_ids: the ids that it continues.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    prompt_ids: list[int]
    timings: Timings

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of the tokens after the first; 0 where there was only one."""
        steps = self.usage.completion_tokens - 1
        return steps / self.timings.decode_s if steps > 0 and self.timings.decode_s > 0 else 0.0


def _whole(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}={value!r}: expected a whole number from {least}")


def _number(field: str, value: object, fits: Callable[[float], bool], allowed: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
        raise ValueError(f"{field}={value!r}: expected a number {allowed}")
