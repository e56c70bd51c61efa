"""Reasoning and answer: how templates mark the first, how it is switched on and off, and how a stream is parted.

A model that reasons writes `<think> ... </think>` before its answer. Some templates write the opening mark themselves,
so that the model begins inside. Marks may come in pieces, over several tokens; nothing of a mark is ever shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Environment, TemplateError, meta

from plait.text.tokenizer import Tokenizer

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Marks:
    """What opens and what closes reasoning."""

    open: str = "<think>"
    close: str = "</think>"


MARKS = (Marks(), Marks("[THINK]", "[/THINK]"), Marks("<seed:think>", "</seed:think>"))
"""Marks that models are known to use."""

# names under which templates let themselves be told
_SWITCHES = ("enable_thinking", "thinking")
_ON, _OFF = "/think", "/no_think"


def marks_of(template: str) -> Marks | None:
    """The marks that a template's text holds, None for a model that does not reason."""
    return next((marks for marks in MARKS if marks.open in template or marks.close in template), None)


def switch_of(template: str) -> str | None:
    """How a template is told whether to reason: the name of a value, "/no_think" for words in messages, or None."""
    names = _free_names(template)
    named = next((name for name in _SWITCHES if name in names), None)
    return named or (_OFF if _OFF in template else None)


def switched(
    messages: Sequence[Message], template: str, thinks: bool | None
) -> tuple[Sequence[Message], dict[str, object]]:
    """Messages and template values that turn reasoning on or off.

    Args:
        messages: a conversation.
        template: Jinja text.
        thinks: True, False, or None for the template's own default.

    Returns: the conversation, with a word in its system text where the template looks for one; and values for `render`.
        Both unchanged and empty for a template that knows no switch.
    """
    switch = None if thinks is None else switch_of(template)
    if switch is None:
        return messages, {}
    if switch != _OFF:
        return messages, {switch: thinks}
    word = _ON if thinks else _OFF
    # templates heed the last message that has a word, so that one in the system text would lose against the user's
    cleared = [_without_words(message) for message in messages]
    if cleared and cleared[0].get("role") == "system":
        return [dict(cleared[0]) | {"content": _joined(cleared[0].get("content"), word)}, *cleared[1:]], {}
    return [{"role": "system", "content": word}, *cleared], {}


class Split:
    """Parts a stream of text into reasoning and answer; each piece comes out as soon as it is certain what it is."""

    def __init__(self, marks: Marks | None, *, is_open: bool = False) -> None:
        """
        Args:
            marks: None for text that is all answer.
            is_open: the text begins inside of reasoning; else reasoning may only come first.
        """
        self._marks = marks or Marks()
        self._state = "answer" if marks is None else "open" if is_open else "begin"
        self._held = ""
        self._trims = is_open
        """White space after a mark belongs to nobody."""

    @property
    def is_open(self) -> bool:
        """Whether the text so far ends inside of reasoning."""
        return self._state == "open"

    def add(self, text: str) -> tuple[str, str]:
        """Take the next piece; return what is certain now: (reasoning, answer), often empty."""
        reasoning = answer = ""
        self._held += text
        if self._state == "begin":
            self._begin()
        if self._state == "open":
            reasoning = self._reasoning()
        if self._state == "answer":
            answer, self._held = self._trimmed(self._held), ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """The text has ended: what was held back was no mark."""
        rest, self._held = self._trimmed(self._held), ""
        return (rest, "") if self._state == "open" else ("", rest)

    def _begin(self) -> None:
        begun, mark = self._held.lstrip(), self._marks.open
        if begun.startswith(mark):
            self._state, self._held, self._trims = "open", begun[len(mark) :], True
        elif not mark.startswith(begun):
            self._state = "answer"

    def _reasoning(self) -> str:
        before, mark, after = self._held.partition(self._marks.close)
        if mark:
            shown = self._trimmed(before)
            self._state, self._held, self._trims = "answer", after, True
            return shown
        keep = overlap(before, self._marks.close)
        shown, self._held = before[: len(before) - keep], before[len(before) - keep :]
        return self._trimmed(shown)

    def _trimmed(self, text: str) -> str:
        if not self._trims:
            return text
        text = text.lstrip()
        self._trims = not text
        return text


class MarkStream:
    """The stream of a tokenizer that hides special tokens, but shows some: marks of reasoning and of tool calls."""

    def __init__(self, tokenizer: Tokenizer, marks: Iterable[str]) -> None:
        """
        Args:
            tokenizer: whose ids come.
            marks: texts to show; those that are no single token are shown in any case.
        """
        self._stream = tokenizer.stream()
        ids = {tokenizer.id_of(mark): mark for mark in marks}
        self._marks = {i: mark for i, mark in ids.items() if i is not None and not tokenizer.decode([i])}

    def add(self, token_id: int) -> str:
        """As StreamDecoder."""
        mark = self._marks.get(token_id)
        return self._stream.add(token_id) if mark is None else self._stream.finish() + mark

    def finish(self) -> str:
        """As StreamDecoder."""
        return self._stream.finish()


def overlap(text: str, mark: str) -> int:
    """The longest end of `text` that is a beginning of `mark` but not all of it, in characters."""
    for n in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0


@lru_cache(maxsize=32)
def _free_names(template: str) -> frozenset[str]:
    """Names that the template is given from outside; none for one that cannot be read, which `render` will refuse."""
    # blocks of other libraries would be errors here, and matter not
    text = template.replace("{%- generation", "{%- if true").replace("{% generation", "{% if true")
    text = text.replace("endgeneration", "endif")
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
        return frozenset(meta.find_undeclared_variables(environment.parse(text)))
    except (TemplateError, RecursionError):
        return frozenset()


def _without_words(message: Message) -> Message:
    content = message.get("content")
    if message.get("role") not in ("system", "user") or not isinstance(content, str):
        return message
    if _OFF not in content and _ON not in content.replace("</think>", ""):
        return message
    kept = content.replace(_OFF, "").replace("</think>", "\0").replace(_ON, "").replace("\0", "</think>")
    return dict(message) | {"content": kept.strip()}


def _joined(content: object, word: str) -> object:
    if isinstance(content, str):
        return f"{content}\n{word}" if content else word
    if isinstance(content, list | tuple):
        return [*content, {"type": "text", "text": word}]
    return word
