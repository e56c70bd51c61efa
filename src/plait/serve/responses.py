"""/v1/responses: OpenAI's newer route, for what its client needs of it to write text and call functions.

Nothing is stored between requests: a conversation is given whole in `input`, as /v1/chat/completions takes messages.
A response is a chat answer in other words: its reasoning, its message and its calls are items of one list.
"""

import time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from plait.engine.sequence import Delta
from plait.serve.ask import Asked, ask_chat
from plait.serve.chat import Answer, parted_by
from plait.serve.door import Event
from plait.serve.error import RequestError
from plait.serve.limits import Limits
from plait.serve.protocol import Call as PastCall
from plait.serve.protocol import (
    CalledFunction,
    ChatBody,
    FunctionTool,
    JsonSchema,
    Message,
    Name,
    NamedFunction,
    Part,
    ResponseFormat,
    Sampled,
    StreamOptions,
    Tag,
    Text,
    Tool,
    ToolChoice,
)
from plait.serve.schema import Limit
from plait.serve.served import Served
from plait.serve.usage import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something said before: a message, a call, what a call gave, or reasoning (which is left out)."""

    OPEN: ClassVar[bool] = True

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Annotated[tuple[Part, ...], Limit(most=1024)] | None = None
    call_id: Annotated[str, Limit(most=256)] = ""
    name: Annotated[str, Limit(most=64)] = ""
    arguments: Text = ""
    output: Text | Annotated[tuple[Part, ...], Limit(most=1024)] = ""

    def __post_init__(self) -> None:
        if self.type == "message" and (self.role is None or self.content is None):
            raise RequestError("is missing", "role" if self.role is None else "content")
        if self.type == "function_call" and not self.name:
            raise RequestError("is missing", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTool(FunctionTool):
    """A function that the model may call; functions are the only kind of tool."""

    type: Literal["function"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatChoice:
    """The function that must be called."""

    type: Literal["function"]
    name: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFormat:
    """Text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "answer"
    description: Text = ""
    schema: dict[str, object] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How the text is written."""

    format: TextFormat = TextFormat()
    verbosity: Tag = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """How much is thought."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Tag = ""
    generate_summary: Tag = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesBody(Sampled):
    """POST /v1/responses."""

    input: Text | Annotated[tuple[Item, ...], Limit(least=1, most=4096)]
    instructions: Text = ""
    max_output_tokens: Annotated[int, Limit(low=1, high=1 << 24)] | None = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    tools: Annotated[tuple[FlatTool, ...], Limit(most=128)] = ()
    tool_choice: Literal["none", "auto", "required"] | FlatChoice = "auto"
    parallel_tool_calls: bool = True
    thinking_token_budget: Annotated[int, Limit(low=0, high=1 << 24)] | None = None
    n: Annotated[int, Limit(low=1, high=1)] = 1
    previous_response_id: Annotated[str, Limit(most=0, help="not supported: nothing is stored")] = ""
    background: Literal[False] = False
    store: Annotated[bool, Limit(help="accepted, without effect")] = False
    include: Annotated[tuple[Tag, ...], Limit(most=16, help="accepted, without effect")] = ()
    truncation: Annotated[Literal["auto", "disabled"], Limit(help="auto is the same as disabled")] = "disabled"
    metadata: Annotated[dict[str, Tag], Limit(most=16, help="given back")] = field(default_factory=dict)
    service_tier: Tag = ""
    safety_identifier: Tag = ""
    prompt_cache_key: Tag = ""


def chat_body(body: ResponsesBody) -> ChatBody:
    """The same request in the words of the chat route.

    Raises: RequestError naming the field.
    """
    items = (Item(role="user", content=body.input),) if isinstance(body.input, str) else body.input
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    for item in items:
        if item.type == "message":
            assert item.role is not None
            messages.append(Message(role=item.role, content=item.content))
        elif item.type == "function_call":
            call = PastCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            messages.append(Message(role="assistant", content=None, tool_calls=(call,)))
        elif item.type == "function_call_output":
            messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
    if not messages:
        raise RequestError("input has reasoning only; give a message", "input")
    choice = body.tool_choice
    shared = {name: getattr(body, name) for name in Sampled.__dataclass_fields__ if name != "stream_options"}
    wanted = body.text.format
    schema = JsonSchema(name=wanted.name, description=wanted.description, schema=wanted.schema, strict=wanted.strict)
    return ChatBody(
        **shared,
        stream_options=StreamOptions(),
        messages=tuple(messages),
        max_completion_tokens=body.max_output_tokens,
        response_format=ResponseFormat(type=wanted.type, json_schema=schema if wanted.type == "json_schema" else None),
        tools=tuple(
            Tool(
                type="function",
                function=FunctionTool(name=t.name, description=t.description, parameters=t.parameters, strict=t.strict),
            )
            for t in body.tools
        ),
        tool_choice=choice
        if isinstance(choice, str)
        else ToolChoice(type="function", function=NamedFunction(name=choice.name)),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort,
        thinking_token_budget=body.thinking_token_budget,
    )


def ask_response(body: ResponsesBody, served: Served, limits: Limits, request_id: str) -> Asked:
    """The request of the engine.

    Raises: RequestError naming the field, as far as possible in the words of this route.
    """
    try:
        return ask_chat(chat_body(body), served, limits, request_id)
    except RequestError as error:
        names = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
        ours = names.get(error.param or "", error.param)
        words = error.message.replace(error.param or "\0", ours or "")
        raise RequestError(words, ours, status=error.status, code=error.code, retry_after=error.retry_after) from None


class ResponseForm:
    """Writes one response."""

    names_events = True

    def __init__(self, body: ResponsesBody, served: Served, asked: Asked, request_id: str) -> None:
        self._body, self._id = body, request_id
        self._answer = Answer(parted_by(chat_body(body), served))
        self._tally = Tally(served.state_bytes)
        self._model, self._created = served.name, int(time.time())
        self._n_events = 0
        self._open: Literal["reasoning", "message"] | None = None
        # items as they stand in the list: the kind, and for calls which
        self._order: list[tuple[str, int]] = []

    def begin(self) -> list[Event]:
        """That the response is under way."""
        self._answer.reason = None
        return [
            self._event(f"response.{name}", response=self._object("in_progress")) for name in ("created", "in_progress")
        ]

    def add(self, prompt: int, delta: Delta) -> list[Event]:
        """Events of what is new."""
        text, calls = self._answer.add(delta)
        self._tally.add(prompt, delta.index, delta.usage)
        events = self._write("reasoning", delta.reasoning) + self._write("message", text)
        for call in calls:
            if call.name:
                events += self._close()
                self._order.append(("function_call", call.index))
                at = len(self._order) - 1
                events.append(self._event("response.output_item.added", output_index=at, item=self._item(at, True)))
            if call.arguments:
                at = self._order.index(("function_call", call.index))
                where = {"item_id": f"fc_{self._id}_{call.index}", "output_index": at}
                events.append(self._event("response.function_call_arguments.delta", **where, delta=call.arguments))
        return events

    def spoken(self) -> dict[str, object]:
        """The answer as a message."""
        return self._answer.message()

    def end(self) -> list[Event]:
        """That every item and the response are complete."""
        events = self._close()
        for at, (kind, i) in enumerate(self._order):
            if kind == "function_call":
                where = {"item_id": f"fc_{self._id}_{i}", "output_index": at}
                call = self._answer.calls[i]
                events.append(
                    self._event(
                        "response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments
                    )
                )
                events.append(self._event("response.output_item.done", output_index=at, item=self._item(at)))
        return [*events, self._event(f"response.{self._status}", response=self._object(self._status))]

    def whole(self) -> Event:
        """The object of a request that does not stream."""
        if not self._order:
            answer = self._answer
            if answer.reasoning:
                self._order.append(("reasoning", 0))
            if answer.content or not answer.calls:
                self._order.append(("message", 0))
            self._order += [("function_call", i) for i in range(len(answer.calls))]
        return self._object(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self._answer.reason == "length" else "completed"

    def _write(self, kind: Literal["reasoning", "message"], text: str) -> list[Event]:
        if not text:
            return []
        events: list[Event] = []
        if self._open != kind:
            events += self._close()
            self._open = kind
            # a second message after calls goes on in the first: an answer has one text
            if (kind, 0) not in self._order:
                self._order.append((kind, 0))
                at = len(self._order) - 1
                events.append(self._event("response.output_item.added", output_index=at, item=self._item(at, True)))
                events.append(self._event("response.content_part.added", **self._place(kind), part=_part(kind, "")))
        name = "output_text" if kind == "message" else "reasoning_text"
        extra = {"logprobs": []} if kind == "message" else {}
        return [*events, self._event(f"response.{name}.delta", **self._place(kind), delta=text, **extra)]

    def _close(self) -> list[Event]:
        kind, self._open = self._open, None
        if kind is None:
            return []
        text = self._answer.content if kind == "message" else self._answer.reasoning
        name = "output_text" if kind == "message" else "reasoning_text"
        extra = {"logprobs": []} if kind == "message" else {}
        at = self._order.index((kind, 0))
        return [
            self._event(f"response.{name}.done", **self._place(kind), text=text, **extra),
            self._event("response.content_part.done", **self._place(kind), part=_part(kind, text)),
            self._event("response.output_item.done", output_index=at, item=self._item(at)),
        ]

    def _place(self, kind: str) -> dict[str, object]:
        prefix = "msg" if kind == "message" else "rs"
        return {
            "item_id": f"{prefix}_{self._id}",
            "output_index": self._order.index((kind, 0)),
            "content_index": 0,
        }

    def _item(self, at: int, is_new: bool = False) -> dict[str, object]:
        kind, i = self._order[at]
        status = "in_progress" if is_new else "completed"
        if kind == "reasoning":
            content = [] if is_new else [_part(kind, self._answer.reasoning)]
            return {"type": kind, "id": f"rs_{self._id}", "summary": [], "content": content, "status": status}
        if kind == "message":
            content = [] if is_new else [_part(kind, self._answer.content)]
            who = {"role": "assistant", "status": status}
            return {"type": kind, "id": f"msg_{self._id}", "content": content, **who}
        call = self._answer.calls[i]
        arguments = "" if is_new else call.arguments
        named = {"call_id": call.id, "name": call.name, "arguments": arguments, "status": status}
        return {"type": kind, "id": f"fc_{self._id}_{i}", **named}

    def _object(self, status: str) -> Event:
        body, usage = self._body, self._tally.to_dict()
        done = status != "in_progress"
        counted = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": [self._item(at) for at in range(len(self._order))] if done else [],
            "usage": counted if done else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "tool_choice": body.tool_choice
            if isinstance(body.tool_choice, str)
            else {"type": "function", "name": body.tool_choice.name},
            "tools": [
                {"type": "function", "name": t.name, "parameters": t.parameters, "strict": t.strict} for t in body.tools
            ],
            "truncation": "disabled",
        }

    def _event(self, kind: str, **fields: object) -> Event:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}


def _part(kind: str, text: str) -> dict[str, object]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
