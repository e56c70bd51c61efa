"""Calls of functions in a model's answer: where its template's way of writing them begins and ends, and what they say.

    Nemotron Nano 2    <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>
    Hermes, Qwen       <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number
    Qwen Coder, Nemotron 3
                       <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>
    Mistral            [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    Llama              {"name": ..., "parameters": {...}}, all of the answer

A call comes out whole, as soon as it has ended: what turns out to be none, because it is cut off, no JSON, or names a
function that was not offered, is given back as text.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """One call. arguments: JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str


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
        self._inside = False
        self._n = 0

    @property
    def n_calls(self) -> int:
        """Calls so far."""
        return self._n

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take the next piece; return the text that is certain now, and calls that have ended."""
        self._held += text
        said, calls = "", []
        while True:
            if not self._inside:
                piece, self._inside = self._outside()
                said += piece
            if not self._inside or not self._form.close or self._form.close not in self._held:
                return said, calls
            body, _, self._held = self._held.partition(self._form.close)
            self._inside = False
            new = self._calls(body)
            if new is None:
                said += self._form.open + body + self._form.close
            calls += new or []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The answer has ended: an open call may be whole all the same."""
        rest, self._held = self._held, ""
        if not self._inside:
            return ("" if self._n else rest), []
        calls = self._calls(rest)
        return ("", calls) if calls is not None else (self._form.open + rest, [])

    def _outside(self) -> tuple[str, bool]:
        """Text that is said, up to where a call begins; whether it does."""
        mark = self._form.open
        if not mark:
            begun = self._held.lstrip()
            if begun.startswith(("{", _PREFIX)):
                return "", True
            if not begun or _PREFIX.startswith(begun):
                return "", False
            said, self._held = self._held, ""
            return said, False
        before, found, after = self._held.partition(mark)
        if found:
            self._held = after
            return before.rstrip(), True
        # white space before a call belongs to nobody
        keep = overlap(before, mark)
        said = before[: len(before) - keep].rstrip()
        self._held = before[len(said) :]
        return said, False

    def _calls(self, body: str) -> list[ToolCall] | None:
        """The calls in a body, None if it is none."""
        try:
            pairs = self._tagged(body) if self._form.inner == "tags" else self._listed(body)
        except (ValueError, RecursionError):
            return None
        if not pairs or any(name not in self._parameters for name, _ in pairs):
            return None
        calls = []
        for name, arguments in pairs:
            text = json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(index=self._n, id=f"call_{secrets.token_hex(12)}", name=name, arguments=text))
            self._n += 1
        return calls

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
        whole = re.fullmatch(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*)?", body, re.DOTALL)
        if whole is None:
            raise ValueError("no call")
        name, inner = whole[1].strip(), whole[2]
        found = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", inner, re.DOTALL)
        if re.sub(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", "", inner, flags=re.DOTALL).strip():
            raise ValueError("no call")
        properties = self._parameters.get(name, {}).get("properties")
        types = properties if isinstance(properties, Mapping) else {}
        return [(name, {key.strip(): _value(text, types.get(key.strip())) for key, text in found})]


def _value(text: str, schema: object) -> object:
    """What a tag's text stands for: text where text is wanted, else JSON where it is some."""
    wanted = schema.get("type") if isinstance(schema, Mapping) else None
    if wanted == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
