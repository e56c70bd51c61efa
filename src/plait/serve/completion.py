"""Answers of /v1/completions: one object, or chunks of it."""

import time

from plait.engine.request import FinishReason, Logprob
from plait.engine.sequence import Delta
from plait.serve.ask import Asked
from plait.serve.door import Event
from plait.serve.protocol import CompletionBody
from plait.serve.served import Served
from plait.serve.spelling import completion_logprobs, spell
from plait.serve.usage import Tally


class CompletionForm:
    """Writes the answers to one or several prompts, n to each, in order of the prompts."""

    names_events = False

    def __init__(self, body: CompletionBody, served: Served, asked: Asked, request_id: str) -> None:
        self._body, self._served = body, served
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        n = len(asked.requests) * body.n
        self._echoes = [asked.prompts[i // body.n] if asked.prompts else "" for i in range(n)]
        self._texts = list(self._echoes)
        self._logprobs: list[list[Logprob]] = [[] for _ in range(n)]
        self._offsets = [0] * n
        self._reasons: list[str | None] = [None] * n
        self._tally = Tally(served.state_bytes)

    def begin(self) -> list[Event]:
        """The prompts, if they are to be repeated."""
        return [self._chunk(i, echo, None, []) for i, echo in enumerate(self._echoes) if echo]

    def add(self, prompt: int, delta: Delta) -> list[Event]:
        """A chunk of what is new."""
        at = prompt * self._body.n + delta.index
        found = [each for each in delta.logprobs or () if isinstance(each, Logprob)]
        self._texts[at] += delta.text
        self._logprobs[at] += found
        if delta.finish_reason is not None:
            self._reasons[at] = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        self._tally.add(prompt, delta.index, delta.usage)
        if not delta.text and not found and delta.finish_reason is None:
            return []
        event = self._chunk(at, delta.text, self._reasons[at], found)
        self._offsets[at] += sum(len(spell(self._served.tokenizer, each.token_id)) for each in found)
        return [event]

    def spoken(self) -> dict[str, object]:
        """The first answer as a message."""
        return {"role": "assistant", "content": self._texts[0]}

    def end(self) -> list[Event]:
        """What was used, if that was asked for."""
        if not self._body.stream_options.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._tally.to_dict()}]

    def whole(self) -> Event:
        """The object of a request that does not stream."""
        choices = [
            self._choice(i, text, self._reasons[i], self._logprobs[i], len(self._echoes[i]))
            for i, text in enumerate(self._texts)
        ]
        return {**self._head, "choices": choices, "usage": self._tally.to_dict()}

    def _chunk(self, at: int, text: str, reason: str | None, found: list[Logprob]) -> Event:
        options = self._body.stream_options
        usage = {"usage": self._tally.to_dict() if options.continuous_usage_stats else None}
        choice = self._choice(at, text, reason, found, len(self._echoes[at]) + self._offsets[at])
        return {**self._head, "choices": [choice], **(usage if options.include_usage else {})}

    def _choice(self, at: int, text: str, reason: str | None, found: list[Logprob], offset: int) -> Event:
        wanted = self._body.logprobs
        logprobs = None if wanted is None else completion_logprobs(self._served.tokenizer, found, wanted, offset)
        return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": reason}
