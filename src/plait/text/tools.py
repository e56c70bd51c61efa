"""Calls of functions in a model's answer: where its template's way of writing them begins and ends, and what they say.

    Nemotron Nano 2    <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>
    Hermes, Qwen       <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number
    Qwen Coder, Nemotron 3
                       <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>
    Mistral            [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    Llama              {"name": ..., "parameters": {...}}, all of the answer

A call comes out whole, as soon as it has ended, or piece by piece where it is JSON and begins with its name. What turns
out to be none, because it is cut off, no JSON, or names a function that was not offered, is given back as text; a call
that has begun to come out stays as the model has written it.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from plait.text.arguments import Arguments
from plait.text.reasoning import overlap

Tool = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How calls are written.

    open, close: marks around them; an empty open means all of the answer, an empty close its end. inner: a list of
    calls, one call, or tags. arguments: name of the arguments' field.
    """

    name: str
    open: str
    close: str
    inner: Literal["list", "one", "tags"]
    arguments: str = "arguments"


FORMATS = {
    "toolcall": ToolFormat(name="toolcall", open="<TOOLCALL>", close="</TOOLCALL>", inner="list"),
    "tags": ToolFormat(name="tags", open="<tool_call>", close="</tool_call>", inner="tags"),
    "hermes": ToolFormat(name="hermes", open="<tool_call>", close="</tool_call>", inner="one"),
    "mistral": ToolFormat(name="mistral", open="[TOOL_CALLS]", close="", inner="list"),
    "llama": ToolFormat(name="llama", open="", close="", inner="one", arguments="parameters"),
}

# what a template's text must hold for each, the first that fits
_SIGNS = (
    ("toolcall", "<TOOLCALL>"),
    ("tags", "<function="),
    ("hermes", "<tool_call>"),
    ("mistral", "[TOOL_CALLS]"),
    ("llama", '"parameters"'),
)
# what may stand before Llama's calls
_PREFIX = "<|python_tag|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call or its beginning, or, without id and name, more of the last one's arguments: JSON text of an object."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


def gather(calls: list[ToolCall], new: Iterable[ToolCall]) -> None:
    """Add to whole calls what has come of them, or of more."""
    for call in new:
        if call.name:
            calls.append(call)
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + call.arguments)


def format_of(template: str) -> ToolFormat | None:
    """How a template's model writes calls, None if it writes none that is known."""
    return next((FORMATS[name] for name, sign in _SIGNS if sign in template), None)


def marks_of_tools(template: str) -> tuple[str, ...]:
    """Texts that must be shown even where they are special tokens, so that calls can be seen."""
    found = format_of(template)
    return () if found is None else tuple(mark for mark in (found.open, found.close, _PREFIX) if mark)


def parameters_of(tools: Sequence[Tool]) -> dict[str, Mapping[str, object]]:
    """Name and schema of the parameters of each function.

    Raises: ValueError naming the tool that is none.
    """
    found: dict[str, Mapping[str, object]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f'tools[{i}] = {tool!r} is no tool; write {{"function": {{"name": ..., ...}}}}')
        schema = function.get("parameters")
        if not isinstance(schema, Mapping | None):
            raise ValueError(f"tools[{i}].function.parameters = {schema!r} is no JSON schema of an object")
        found[function["name"]] = schema or {"type": "object", "properties": {}}
    return found


class ToolStream:
    """Parts the text of an answer into what is said and the calls in it."""

    def __init__(self, form: ToolFormat, tools: Sequence[Tool]) -> None:
        """Args: form: how calls are written. tools: the functions that were offered.

        Raises: ValueError naming the tool that is none.
        """
        self._form, self._parameters = form, parameters_of(tools)
        self._held = ""
        self._body: list[str] | None = None
        """What stands between the marks so far, None outside of them."""
        self._early = Arguments((), "")
        self._n = 0
        self._has_spoken = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take the next piece; return the text that is certain now, and what is new of calls."""
        self._held += text
        said, calls = "", []
        while True:
            if self._body is None:
                said += self._outside()
            if self._body is None:
                return said, calls
            before, closed, after = self._held, "", ""
            if self._form.close:
                before, closed, after = self._held.partition(self._form.close)
            if not closed:
                keep = overlap(before, self._form.close)
                before, after = before[: len(before) - keep], before[len(before) - keep :]
            self._held = after
            calls += self._inside(before)
            if not closed:
                return said, calls
            rest, more = self._ended(closed)
            said, calls = said + rest, calls + more

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The answer has ended: an open call may be whole all the same."""
        rest, self._held = self._held, ""
        if self._body is None:
            return ("" if self._n else rest), []
        calls = self._inside(rest)
        said, more = self._ended("")
        return said, calls + more

    def _outside(self) -> str:
        """Text that is said, up to where a call begins."""
        mark = self._form.open
        if mark:
            said, found, rest = self._held.partition(mark)
            # white space before a call belongs to nobody
            said = said[: len(said) - (0 if found else overlap(said, mark))].rstrip()
        else:
            begun = "" if self._has_spoken else self._held.lstrip()
            found, rest = begun.startswith(("{", _PREFIX)), self._held
            waits = found or (not self._has_spoken and _PREFIX.startswith(begun))
            said = "" if waits else self._held
        self._held = rest if found else self._held[len(said) :]
        self._has_spoken |= bool(said)
        if found:
            names = () if self._form.inner == "tags" else self._parameters
            self._body, self._early = [], Arguments(names, self._form.arguments)
        return said

    def _inside(self, text: str) -> list[ToolCall]:
        """Take a piece of a body; what is certain of its calls already."""
        assert self._body is not None
        self._body.append(text)
        return [
            self._begin(name) if name else ToolCall(index=self._n - 1, arguments=more)
            for name, more in self._early.add(text)
        ]

    def _begin(self, name: str, arguments: str = "") -> ToolCall:
        self._n += 1
        return ToolCall(index=self._n - 1, id=f"call_{secrets.token_hex(12)}", name=name, arguments=arguments)

    def _ended(self, close: str) -> tuple[str, list[ToolCall]]:
        """Text and calls of the body that has ended, but for calls that came out early."""
        assert self._body is not None
        body, self._body = "".join(self._body), None
        try:
            pairs = self._tagged(body) if self._form.inner == "tags" else self._listed(body)
        except (ValueError, RecursionError):
            pairs = []
        known = [pair for pair in pairs if pair[0] in self._parameters]
        if not self._early.n and (not pairs or len(known) < len(pairs)):
            return self._form.open + body + close, []
        # behind a call that came early, what is none is dropped: it cannot be text any more
        late = known[self._early.n :]
        return "", [self._begin(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in late]

    def _listed(self, body: str) -> list[tuple[str, object]]:
        text = body.strip().removeprefix(_PREFIX)
        if not self._form.open:
            # Llama writes several with semicolons between
            text = "[" + re.sub(r"\}\s*;\s*\{", "},{", text) + "]"
        data = json.loads(text)
        found = []
        for call in data if isinstance(data, list) else [data]:
            arguments = call.get(self._form.arguments, call.get("arguments")) if isinstance(call, dict) else None
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
                raise ValueError("no call")
            found.append((call["name"], arguments))
        return found

    def _tagged(self, body: str) -> list[tuple[str, object]]:
        name, at = _tag(body, "<function=", 0)
        properties = self._parameters.get(name, {}).get("properties")
        types = properties if isinstance(properties, Mapping) else {}
        arguments = {}
        while (at := _blank(body, at)) < len(body) and not body.startswith("</function>", at):
            key, at = _tag(body, "<parameter=", at)
            # the first that does not end is the last that is looked at
            end = body.index("</parameter>", at)
            value = body[at:end].removeprefix("\n").removesuffix("\n")
            arguments[key], at = _value(value, types.get(key)), end + len("</parameter>")
        if _blank(body, min(at + len("</function>"), len(body))) < len(body):
            raise ValueError("no call")
        return [(name, arguments)]


def _blank(text: str, at: int) -> int:
    """Where white space ends that begins there."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _tag(text: str, mark: str, at: int) -> tuple[str, int]:
    """The name in a tag that stands there, after white space, and where the tag ends; ValueError if there is none."""
    at = _blank(text, at)
    end = text.index(">", at)
    name = text[at + len(mark) : end]
    if not text.startswith(mark, at) or not name or "\n" in name:
        raise ValueError("no call")
    return name.strip(), end + 1


def _value(text: str, schema: object) -> object:
    """What a tag's text stands for: text where text is wanted, else JSON where it is some."""
    wanted = schema.get("type") if isinstance(schema, Mapping) else None
    if wanted == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
