"""Reasoning parted from the answer: pieces, however cut, join to the same two texts; switches of templates."""

import random

import pytest

from plait.text.bpe import train_bpe
from plait.text.chat import CHATML, render
from plait.text.reasoning import Marks, MarkStream, Split, marks_of, switch_of, switched

NANO = """\
{%- set ns = namespace(enable_thinking=true) -%}
{%- for m in messages if m.role in ('system', 'user') -%}
{%- if '/think' in m.content.replace('</think>', '') -%}{%- set ns.enable_thinking = true -%}
{%- elif '/no_think' in m.content -%}{%- set ns.enable_thinking = false -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}{{ m.role + ':' + m.content.replace('/no_think', '').replace('/think', '') }}{%- endfor -%}
{{- '<think>\\n' if ns.enable_thinking else '<think></think>' -}}
"""
QWEN = """\
{%- for m in messages -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}{%- endfor -%}
{%- if enable_thinking is defined and enable_thinking is false -%}<think>\n\n</think>{%- endif -%}
"""


def split(pieces: list[str], is_open: bool = False, marks: Marks | None = None) -> tuple[str, str]:
    stream = Split(marks or Marks(), is_open=is_open)
    parts = [*(stream.add(piece) for piece in pieces), stream.finish()]
    return "".join(r for r, _ in parts), "".join(a for _, a in parts)


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "answer"),
    [
        ("<think>\nwhy\n</think>\n\nso", False, "why\n", "so"),
        ("why</think>so", True, "why", "so"),
        ("\n <think>a</think>", False, "a", ""),
        ("no marks <think>here</think>", False, "", "no marks <think>here</think>"),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<thin", False, "", "<thin"),
        ("a </ b </think> c </think> d", True, "a </ b ", "c </think> d"),
        ("", True, "", ""),
        ("\n\n</think>\n\n", True, "", ""),
        ("  indented", False, "", "  indented"),
        ("</think>  x  ", True, "", "x  "),
    ],
)
def test_text_is_parted_the_same_however_it_is_cut(text: str, is_open: bool, reasoning: str, answer: str) -> None:
    assert split([text], is_open) == (reasoning, answer)
    assert split(list(text), is_open) == (reasoning, answer)
    for _ in range(20):
        cuts = sorted(random.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(pieces, is_open) == (reasoning, answer)


def test_nothing_is_held_back_longer_than_it_may_be_a_mark() -> None:
    stream = Split(Marks(), is_open=True)
    assert stream.add("so <") == ("so ", "")
    assert stream.add("/b") == ("</b", "")
    assert stream.add("</think") == ("", "")
    assert stream.add(">\n") == ("", "")
    assert stream.add("yes") == ("", "yes")


def test_without_marks_all_is_answer() -> None:
    stream = Split(None)
    assert stream.add("<think>x</think>") == ("", "<think>x</think>")


def test_marks_are_found_in_templates() -> None:
    assert marks_of(CHATML) == marks_of(NANO) == Marks()
    assert marks_of("{{ '[THINK]' }}") == Marks("[THINK]", "[/THINK]")
    assert marks_of("{{ messages }}") is None


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("said", ["Hi", "Hi /think", "Hi /no_think", "see </think>"])
@pytest.mark.parametrize("system", [None, "Be brief. /no_think", ""])
def test_words_in_messages_switch_reasoning_whatever_they_said(thinks: bool, said: str, system: str | None) -> None:
    messages = [{"role": "user", "content": said}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    changed, values = switched(messages, NANO, thinks)
    text = render(changed, NANO, **values)
    assert text.endswith("<think>\n" if thinks else "<think></think>")
    assert "Be brief." in text or not system
    # a mark is no word
    assert ("</think>" in said) == (changed[-1]["content"] == "see </think>")
    # None leaves everything as it was
    assert switched(messages, NANO, None) == (messages, {})


def test_a_value_of_the_template_switches_reasoning() -> None:
    messages = [{"role": "user", "content": "Hi /think"}]
    assert switch_of(QWEN) == "enable_thinking"
    assert switched(messages, QWEN, False) == (messages, {"enable_thinking": False})
    assert render(messages, QWEN, **switched(messages, QWEN, False)[1]).endswith("</think>")
    # a name of the template's own is no switch, nor is one in a template that cannot be read
    assert switch_of(NANO) == "/no_think"
    assert switch_of("{% if thinking %}") is None
    assert switched(messages, "{{ messages }}", False) == (messages, {})


def test_marks_that_are_special_tokens_are_shown_and_others_stay_hidden() -> None:
    tokenizer = train_bpe(["some text of words"], 320)
    tokenizer = type(tokenizer)(tokenizer._backend)
    assert tokenizer.id_of("<|im_start|>") is not None
    stream = MarkStream(tokenizer, ("<|im_start|>", "no such"))
    ids = tokenizer.encode("a<|im_start|>text é<|im_end|>")
    assert "".join(map(stream.add, ids)) + stream.finish() == "a<|im_start|>text é"
