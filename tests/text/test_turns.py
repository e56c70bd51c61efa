"""Which tokens of a conversation the assistant said."""

from dataclasses import replace
from pathlib import Path

import pytest

from plait.text.bpe import train_bpe
from plait.text.chat import encode_chat, render
from plait.text.settings import TokenizerSettings
from plait.text.tokenizer import Tokenizer
from plait.text.turns import encode_turns

ASKED = {"role": "user", "content": "What is  two plus two?\n"}
SAID = {"role": "assistant", "content": "Four, and\nnot five."}
TALK = [
    {"role": "system", "content": "Be brief."},
    ASKED,
    SAID,
    {"role": "user", "content": "Sure?"},
    SAID | {"content": "Yes"},
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """Without a chat template: ChatML."""
    return train_bpe(["What is two plus two? Four, and not five. Sure? Yes, be brief."] * 3, 330)


def said_of(tokenizer: Tokenizer, messages: list[dict[str, object]], **kwargs: object) -> list[str]:
    """Each run of tokens that count, as text."""
    turns = encode_turns(tokenizer, messages, **kwargs)  # type: ignore[arg-type]
    runs: list[list[int]] = []
    before = False
    for token, said in zip(turns.ids, turns.said, strict=True):
        if said:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = said
    return [tokenizer.decode(ids, skip_special=False) for ids in runs]


def test_answers_count_with_the_mark_that_ends_them_and_nothing_else(plain: Tokenizer) -> None:
    assert said_of(plain, TALK) == ["Four, and\nnot five.<|im_end|>", "Yes<|im_end|>"]
    turns = encode_turns(plain, TALK)
    from plait.text.chat import CHATML

    assert plain.decode(turns.ids, skip_special=False) == render(TALK, CHATML, add_generation_prompt=False)


def test_what_is_asked_is_encoded_as_when_the_model_answers(plain: Tokenizer) -> None:
    turns = encode_turns(plain, TALK)
    first = turns.said.index(True)
    assert list(turns.ids[:first]) == encode_chat(plain, TALK[:2])


def test_published_template_with_tools_and_reasoning(shared: Path) -> None:
    tokenizer = Tokenizer.open(shared / "data" / "tokenizers" / "bpe-4096")
    talk = [
        ASKED,
        CALL,
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4."},
    ]
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>'
    assert said_of(tokenizer, talk, tools=TOOLS) == [call, "<think>\nadd\n</think>\n\n4.<|im_end|>"]
    turns = encode_turns(tokenizer, talk, tools=TOOLS)
    assert "tool_response" in tokenizer.decode([t for t, said in zip(turns.ids, turns.said, strict=True) if not said])


def test_what_cannot_be_learnt_from_is_refused(plain: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no message has the role assistant"):
        encode_turns(plain, [ASKED])
    with pytest.raises(ValueError, match=r"messages\[1\].role = 'robot'"):
        encode_turns(plain, [ASKED, {"role": "robot", "content": "x"}, SAID])
    # old reasoning goes once another turn follows
    forgetful = (
        "{%- for m in messages %}{{ '[' + m.role + ']' }}"
        "{%- if m.reasoning_content and loop.last %}{{ m.reasoning_content }}{%- endif %}"
        "{{ m.content + '|' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '[assistant]' }}{%- endif %}"
    )
    tokenizer = Tokenizer(plain._backend, replace(TokenizerSettings(), chat_template=forgetful))
    thought = SAID | {"reasoning_content": "hm"}
    assert said_of(tokenizer, [ASKED, thought]) == ["hmFour, and\nnot five.|"]
    with pytest.raises(ValueError, match=r"messages\[1\] \(assistant\): the chat template writes it differently once"):
        encode_turns(tokenizer, [ASKED, thought, ASKED, thought])
