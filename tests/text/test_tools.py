"""Calls in answers: found however the text is cut, given back as text when they are none."""

import json
import random
from contextlib import suppress

import pytest

from plait.text.chat import CHATML
from plait.text.tools import FORMATS, ToolCall, ToolStream, format_of, gather, marks_of_tools, parameters_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"function": {"name": "now"}},
]
ZURICH = {"city": "Zürich </tool", "days": 3}
CALL = json.dumps({"name": "weather", "arguments": ZURICH}, ensure_ascii=False)
NOW = '{"name": "now", "arguments": {}}'
TURNED = '{"arguments": {}, "name": "now"}'
MORE = CALL[:-1] + ', "id": {"name": 1}}'
SPELLED = json.dumps({"name": "weather", "arguments": json.dumps(ZURICH)}, ensure_ascii=False)
STRANGE = '{"name": "rm", "arguments": {}}'
QUOTED = ("now", {"a": '}"{', "b": [{}]})
LLAMA = CALL.replace("arguments", "parameters")
TAGS = (
    "\n<function=weather>\n<parameter=city>\nZürich </tool\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n"
)


def parsed(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    stream = ToolStream(FORMATS[name], TOOLS)
    parts = [*(stream.add(piece) for piece in pieces), stream.finish()]
    calls: list[ToolCall] = []
    for piece in (piece for _, some in parts for piece in some):
        gather(calls, [piece])
        assert piece.index == len(calls) - 1 and bool(piece.id) == bool(piece.name)
    assert len({call.id for call in calls}) == len(calls)
    return "".join(said for said, _ in parts), [(call.name, json.loads(call.arguments)) for call in calls]


both = [("weather", ZURICH), ("now", {})]


@pytest.mark.parametrize(
    ("name", "text", "said", "calls"),
    [
        ("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", both[:1]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{NOW}\n</tool_call>\n", "", both),
        ("hermes", f"<tool_call>\n{CALL}", "", both[:1]),
        ("hermes", "<tool_call>{bad</tool_call> so", "<tool_call>{bad</tool_call> so", []),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", both[1:]),
        ("hermes", "<tool_call>" + "[" * 5000, None, []),
        ("hermes", "a < b <tool", None, []),
        ("hermes", "no calls \n ", None, []),
        ("toolcall", f"Sure.\n<TOOLCALL>[{CALL}, {NOW}]</TOOLCALL>\n", "Sure.", both),
        ("toolcall", f"<TOOLCALL>[{{, {CALL}]</TOOLCALL>", None, []),
        # what has come out early cannot be taken back
        ("toolcall", f"<TOOLCALL>[{CALL}, {{]</TOOLCALL>.", ".", both[:1]),
        ("toolcall", f"<TOOLCALL>[{CALL}, {STRANGE}, {NOW}]</TOOLCALL>.", ".", both),
        ("toolcall", f"<TOOLCALL>[{STRANGE}, {NOW}]</TOOLCALL>.", None, []),
        ("toolcall", f"<TOOLCALL>[{SPELLED}, {NOW}]</TOOLCALL>", "", both),
        ("mistral", f"[TOOL_CALLS][{NOW}, {SPELLED}, {NOW}]", "", [both[1], *both]),
        ("llama", SPELLED.replace("arguments", "parameters") + f"; {NOW}", "", both),
        ("toolcall", f'<TOOLCALL>{{"name": "now",{" " * 486}"arguments": {{}}}}</TOOLCALL>', "", both[1:]),
        ("toolcall", f"<TOOLCALL>[{TURNED}, {CALL}]</TOOLCALL>", "", both[::-1]),
        ("toolcall", f"<TOOLCALL>{CALL}</TOOLCALL><TOOLCALL>[{MORE}, {NOW}]</TOOLCALL>", "", [*both[:1], *both]),
        ("toolcall", '<TOOLCALL>{"name": "rm", "arguments": ' + NOW + "}</TOOLCALL>", None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "}\\"{", "b": [{}]}}</tool_call>', "", [QUOTED]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}</tool_call>', "", both[1:]),
        ("toolcall", "<TOOLCALL>[]</TOOLCALL>", None, []),
        ("mistral", f"[TOOL_CALLS][{CALL}]", "", both[:1]),
        ("mistral", "[TOOL_CALLS] nothing", None, []),
        ("tags", f"Now.<tool_call>{TAGS}</tool_call>\n", "Now.", both[:1]),
        ("tags", "<tool_call><function=now></function></tool_call>", "", both[1:]),
        ("tags", "<tool_call><function=now>words</function></tool_call>", None, []),
        ("llama", LLAMA, "", both[:1]),
        ("llama", f"<|python_tag|>{LLAMA}; {NOW}", "", both),
        ("llama", '{"an": "answer"}', None, []),
        ("llama", f"see {LLAMA}", None, []),
        ("llama", "in words", None, []),
        ("llama", "", "", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(name: str, text: str, said: str | None, calls: list[object]) -> None:
    expected = (text if said is None else said, calls)
    assert parsed(name, [text]) == expected
    assert parsed(name, list(text)) == expected
    for _ in range(10):
        cuts = sorted(random.choices(range(len(text) + 1), k=5))
        assert parsed(name, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == expected


def test_a_call_comes_out_when_it_ends_and_words_as_soon_as_they_are_none() -> None:
    stream = ToolStream(FORMATS["hermes"], TOOLS)
    assert stream.add("Let me <") == ("Let me", [])
    assert stream.add("b> ") == (" <b>", [])
    assert stream.add("<tool_call>" + TURNED) == ("", [])
    assert [call.name for call in stream.add("</tool_call>")[1]] == ["now"]
    assert stream.add("<tool_call>x</tool_call>y") == ("<tool_call>x</tool_call>y", [])


def test_arguments_come_out_while_they_are_written() -> None:
    stream = ToolStream(FORMATS["hermes"], TOOLS)
    assert stream.add('<tool_call>{"name": "weather", "arguments": ') == ("", [])
    begun, more = stream.add('{"city": "Z')[1]
    assert (begun.index, begun.name, begun.arguments) == (0, "weather", "") and begun.id
    assert (more.index, more.id, more.name, more.arguments) == (0, "", "", '{"city": "Z')
    # this could be the end of the call
    assert stream.add("</tool") == ("", [])
    assert [call.arguments for call in stream.add('"}')[1]] == ['</tool"}']
    assert stream.add(" }\n</tool_call>") == ("", [])


class Counted(str):
    """A text that counts how many of its characters are looked at."""

    looked = 0

    def index(self, sub, start=0, end=None) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        at = self.find(sub, start)
        self.looked += (len(self) if at < 0 else at + len(sub)) - start
        if at < 0:
            raise ValueError("not there")
        return at

    def startswith(self, prefix, start=0, end=None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.looked += len(prefix)
        return super().startswith(prefix, start)

    def __getitem__(self, at) -> str:
        self.looked += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)


@pytest.mark.parametrize(
    "part", ["<parameter=x>1</parameter>", "<parameter=x>", "<parameter=", "</function>", "\n<parameter=x>\n\n"]
)
def test_tags_are_read_in_time_that_grows_with_their_length(part: str) -> None:
    stream = ToolStream(FORMATS["tags"], TOOLS)
    for n in (100, 1000):
        body = Counted("<function=now>" + n * part)
        with suppress(ValueError):
            stream._tagged(body)
        assert 20 < body.looked < 6 * len(body)


def test_the_format_is_read_off_the_template() -> None:
    def of(template: str) -> str | None:
        found = format_of(template)
        return None if found is None else found.name

    assert of(CHATML) == "hermes"
    assert of("{{ '<TOOLCALL>[' }} <tool_call>") == "toolcall"
    assert of("<tool_call>\n<function=example>\n<parameter=x>") == "tags"
    assert of('Respond in the format {"name": function name, "parameters": ...}') == "llama"
    assert of("{{ messages }}") is None and marks_of_tools("{{ messages }}") == ()
    assert marks_of_tools(CHATML)[:2] == ("<tool_call>", "</tool_call>")


def test_what_is_no_tool_is_refused_by_its_place() -> None:
    for bad in ({"function": {}}, {"function": {"name": "x", "parameters": 3}}, "x", {"name": ""}):
        with pytest.raises(ValueError, match=r"tools\[1\]"):
            parameters_of([TOOLS[0], bad])  # pyright: ignore[reportArgumentType]
