"""Answers of /v1/chat/completions: one object, or chunks of it."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from plait.engine.request import FinishReason, Logprob
from plait.engine.sequence import Delta
from plait.serve.ask import Asked
from plait.serve.door import Event
from plait.serve.protocol import ChatBody
from plait.serve.served import Served
from plait.serve.spelling import chat_logprob
from plait.serve.usage import Tally


class CallPiece(Protocol):
    """A bit of a call: which of the answer's calls, its name with its first bit, and more of its arguments."""

    index: int
    name: str | None
    arguments: str


class Calls(Protocol):
    """Takes the text of an answer apart into content and calls of functions."""

    def add(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more of the text; what of it is certain."""
        ...

    def finish(self) -> tuple[str, list[CallPiece]]:
        """What was held back."""
        ...


@dataclass(slots=True)
class Call:
    """One call of a function, as far as it is known."""

    id: str
    name: str
    arguments: str = ""

    def to_dict(self) -> dict[str, object]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come. logprobs: None if not asked for."""

    calls_of: Calls | None = None
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: str | None = None

    def add(self, delta: Delta) -> tuple[str, list[tuple[int, Call | str]]]:
        """Take a piece; returns new content, and of calls either a new one or more of its arguments."""
        text, pieces = delta.text, []
        if self.calls_of is not None:
            text, pieces = self.calls_of.add(delta.text)
            if delta.finish_reason is not None:
                more, last = self.calls_of.finish()
                text, pieces = text + more, [*pieces, *last]
        self.content += text
        self.reasoning += delta.reasoning
        self.logprobs += [found for found in delta.logprobs or () if isinstance(found, Logprob)]
        told: list[tuple[int, Call | str]] = []
        for piece in pieces:
            if piece.index == len(self.calls):
                self.calls.append(Call(f"call_{uuid.uuid4().hex[:24]}", piece.name or "", piece.arguments))
                told.append((piece.index, self.calls[-1]))
            else:
                self.calls[piece.index].arguments += piece.arguments
                told.append((piece.index, piece.arguments))
        if delta.finish_reason is not None:
            self.reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
            if self.calls and self.reason == "stop":
                self.reason = "tool_calls"
        return text, told

    def message(self) -> dict[str, object]:
        """All of it as a message of a conversation."""
        found: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found |= {"content": self.content or None, "tool_calls": [call.to_dict() for call in self.calls]}
        return found


class ChatForm:
    """Writes the answers of one chat request."""

    names_events = False

    def __init__(self, body: ChatBody, served: Served, asked: Asked, request_id: str) -> None:
        self._body, self._served = body, served
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": served.name}
        self._answers = [Answer(calls_of(body, served)) for _ in range(body.n)]
        self._tally = Tally()

    def begin(self) -> list[Event]:
        """A chunk for each answer that says who speaks."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._answers))]

    def add(self, prompt: int, delta: Delta) -> list[Event]:
        """Chunks of what is new."""
        answer = self._answers[delta.index]
        text, told = answer.add(delta)
        self._tally.add(prompt, delta.index, delta.usage)
        said: dict[str, object] = {}
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if text:
            said["content"] = text
        if told:
            said["tool_calls"] = [
                {"index": i} | (new.to_dict() if isinstance(new, Call) else {"function": {"arguments": new}})
                for i, new in told
            ]
        if not said and delta.finish_reason is None and not delta.logprobs:
            return []
        found = [each for each in delta.logprobs or () if isinstance(each, Logprob)]
        return [self._chunk(delta.index, said, answer.reason, found)]

    def spoken(self) -> dict[str, object]:
        """The first answer as a message."""
        return self._answers[0].message()

    def end(self) -> list[Event]:
        """What was used, if that was asked for."""
        if not self._body.stream_options.include_usage:
            return []
        return [self._object("chat.completion.chunk", choices=[], usage=self._tally.to_dict())]

    def whole(self) -> Event:
        """The object of a request that does not stream."""
        choices = []
        for i, answer in enumerate(self._answers):
            message = answer.message() | {"refusal": None}
            logprobs = self._logprobs(answer.logprobs)
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": answer.reason})
        return self._object("chat.completion", choices=choices, usage=self._tally.to_dict())

    def _chunk(
        self, index: int, said: dict[str, object], reason: str | None = None, found: list[Logprob] | None = None
    ) -> Event:
        choice = {"index": index, "delta": said, "logprobs": self._logprobs(found or []), "finish_reason": reason}
        options = self._body.stream_options
        usage = {"usage": self._tally.to_dict() if options.continuous_usage_stats else None}
        return self._object("chat.completion.chunk", choices=[choice], **(usage if options.include_usage else {}))

    def _logprobs(self, found: list[Logprob]) -> dict[str, object] | None:
        if not self._body.logprobs:
            return None
        tokenizer, n_top = self._served.tokenizer, self._body.top_logprobs
        return {"content": [chat_logprob(tokenizer, each, n_top) for each in found], "refusal": None}

    def _object(self, kind: str, **more: object) -> Event:
        return {**self._head, "object": kind, **more}


def calls_of(body: ChatBody, served: Served) -> Calls | None:
    """What takes calls out of an answer, if any may come."""
    return None
