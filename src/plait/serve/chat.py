"""Answers of /v1/chat/completions: one object, or chunks of it."""

import time
from dataclasses import dataclass, field

from plait.engine.request import FinishReason, Logprob
from plait.engine.sequence import Delta
from plait.serve.ask import Asked
from plait.serve.constrain import tools_of
from plait.serve.door import Event
from plait.serve.protocol import ChatBody
from plait.serve.served import Served
from plait.serve.spelling import chat_logprob
from plait.serve.usage import Tally
from plait.text.chat import CHATML
from plait.text.tools import ToolCall, ToolStream, format_of, gather


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come. logprobs: None if not asked for."""

    parted: ToolStream | None = None
    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: str | None = None

    def add(self, delta: Delta) -> tuple[str, list[ToolCall]]:
        """Take a piece; returns what of its text is content, and what is new of calls."""
        text, calls = delta.text, []
        if self.parted is not None:
            text, calls = self.parted.add(delta.text)
            if delta.finish_reason is not None:
                rest, more = self.parted.finish()
                text, calls = text + rest, [*calls, *more]
        self.content += text
        self.reasoning += delta.reasoning
        gather(self.calls, calls)
        self.logprobs += [found for found in delta.logprobs or () if isinstance(found, Logprob)]
        if delta.finish_reason is not None:
            self.reason = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
            if self.calls and self.reason == "stop":
                self.reason = "tool_calls"
        return text, calls

    def message(self) -> dict[str, object]:
        """All of it as a message of a conversation."""
        found: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found |= {"content": self.content or None, "tool_calls": [_called(call) for call in self.calls]}
        return found


class ChatForm:
    """Writes the answers of one chat request."""

    names_events = False

    def __init__(self, body: ChatBody, served: Served, asked: Asked, request_id: str) -> None:
        self._body, self._served = body, served
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": served.name}
        self._answers = [Answer(parted_by(body, served)) for _ in range(body.n)]
        self._tally = Tally(served.state_bytes)

    def begin(self) -> list[Event]:
        """A chunk for each answer that says who speaks."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._answers))]

    def add(self, prompt: int, delta: Delta) -> list[Event]:
        """Chunks of what is new."""
        answer = self._answers[delta.index]
        text, calls = answer.add(delta)
        self._tally.add(prompt, delta.index, delta.usage)
        said: dict[str, object] = {}
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if text:
            said["content"] = text
        if calls:
            said["tool_calls"] = [
                {"index": call.index} | (_called(call) if call.name else {"function": {"arguments": call.arguments}})
                for call in calls
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


def parted_by(body: ChatBody, served: Served) -> ToolStream | None:
    """What takes calls out of an answer, if any may come."""
    form = format_of(served.tokenizer.chat_template or CHATML)
    if form is None or not body.tools or body.tool_choice == "none":
        return None
    return ToolStream(form, tools_of(body))


def _called(call: ToolCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
