"""What one asks of the engine, and what it gives back: settings, requests, completions, as plain records."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.engine.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    max_tokens: at most so many new tokens. temperature: 0 takes the likeliest token (greedy), 1 the model's own
    distribution. top_k: only the k likeliest. top_p: only the likeliest that together hold this probability.
    min_p: only those at least this fraction as likely as the likeliest. repetition_penalty: above 1 makes tokens of
    the prompt and the answer less likely. presence_penalty: taken off the logit of each token that the answer holds;
    frequency_penalty: for each time that it does. logit_bias: added to the logits of these ids, at last; a mapping,
    kept as pairs. logprobs: tell of each new token how likely it was and which k were likeliest (0: of itself only), in
    the model's own distribution: before temperature, filters, penalties, bias and constraints. seed: the same seed
    gives the same tokens, whatever else runs in the batch; None draws one. stop: texts that end the answer and are not
    part of it. stop_ids: token ids that do, besides the model's own. ignore_eos: run on past the model's own end ids.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
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
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), lambda x: -2 <= x <= 2, "from -2 to 2")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely one new token was: nats, of the model's own distribution. top: the likeliest ids, in order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """an end id, a stop id or a stop text"""
    LENGTH = "length"
    """max_tokens were made"""
    CANCELLED = "cancelled"
    """the reader of the stream left"""
    TIMEOUT = "timeout"
    """its time was over"""
    ERROR = "error"
    """it failed; Delta.error says how"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one completion.

    prompt_tokens: all of the prompt; cached_tokens: those of them that a session had seen already.
    completion_tokens: new ones, an end id included; reasoning_tokens: those of them that were thought.
    cache_bytes: what this sequence's cache held at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_bytes: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from the start of the batch to its first tokens, and from there to this sequence's last token."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer.

    text: without end tokens and stop texts; "" where there is no tokenizer. token_ids: all new ids, an end id
    included. prompt_ids: the ids that it continues. reasoning: what was thought before the text. logprobs: of each new
    id, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    prompt_ids: list[int]
    timings: Timings
    reasoning: str = ""
    logprobs: list[Logprob] | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of the tokens after the first; 0 where there was only one."""
        steps = self.usage.completion_tokens - 1
        return steps / self.timings.decode_s if steps > 0 and self.timings.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt on its way into the engine's batch, and what is wanted of it.

    prompt_ids: what is continued. sampling: settings and stop rules of every answer. n: answers, each with randomness
    of its own; they share the prompt. priority: higher ones are begun first. deadline_s: seconds from its submission
    after which it ends as it is. request_id: for logs; "" gets one. thinks: whether the prompt ends inside of a
    reasoning block, None looks at it. thinking_token_budget: tokens of reasoning after which it is closed. constraint:
    what the answer must obey, see plait.engine.constraint. session: what was seen already, used if the prompt goes on
    from there. keeps_session: leave in Handle.session what was seen at the end.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    priority: int = 0
    deadline_s: float | None = None
    request_id: str = ""
    thinks: bool | None = None
    thinking_token_budget: int | None = None
    constraint: object | None = None
    session: "Session | None" = None
    keeps_session: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        _whole("n", self.n, 1)
        if self.deadline_s is not None:
            _number("deadline_s", self.deadline_s, lambda x: 0 < x < math.inf, "of seconds above 0")
        if self.thinking_token_budget is not None:
            _whole("thinking_token_budget", self.thinking_token_budget, 0)
        if self.n > 1 and (self.session is not None or self.keeps_session):
            raise ValueError(f"n={self.n}: a session holds one answer; ask for one, or leave the session out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy an engine is, and counters since it began.

    running, waiting, preempted: sequences in the batch, before their first token, and set aside. slots, pages: of
    state and of keys and values, in use; *_total: there are. cache_bytes: memory of both; beside_bytes: what lies
    outside of them, see plait.engine.core.Limits. peak_wait_steps: the most steps that a request waited while others
    ran. The rest counts: steps; prompt tokens computed; tokens made; requests finished; preemptions; and of the prefix
    cache hits, misses, prompt tokens not computed, snapshots and their bytes, of states and of pages; guessed tokens,
    and those of them that were right.
    """

    running: int = 0
    waiting: int = 0
    preempted: int = 0
    slots: int = 0
    slots_total: int = 0
    pages: int = 0
    pages_total: int = 0
    page_tokens: int = 0
    cache_bytes: int = 0
    beside_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    peak_wait_steps: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_tokens: int = 0
    prefix_entries: int = 0
    prefix_bytes: int = 0
    guessed: int = 0
    guessed_right: int = 0


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    try:
        pairs: dict[int, float] = dict(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias={value!r}: expected a mapping of token ids to numbers") from None
    for token_id, bias in pairs.items():
        _whole("logit_bias", token_id, 0)
        _number(f"logit_bias[{token_id}]", bias, lambda x: -100 <= x <= 100, "from -100 to 100")
    return tuple(sorted(pairs.items()))


def _whole(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}={value!r}: expected a whole number from {least}")


def _number(field: str, value: object, fits: Callable[[float], bool], allowed: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
        raise ValueError(f"{field}={value!r}: expected a number {allowed}")
