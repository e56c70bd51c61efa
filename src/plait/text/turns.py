"""A conversation as ids, and which of them the assistant said: what supervised fine-tuning learns from.

    text = template(messages) = asked_1 said_1 asked_2 said_2 ... rest

said_k is what the template writes for an assistant's message after the opening of its turn, the mark that ends the turn
included, white space after it not. Each piece is encoded by itself: when the model answers, it is given the ids of
asked_k, and its first token begins a piece as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.text.chat import CHATML, render
from plait.text.tokenizer import Tokenizer

Message = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """ids of a whole conversation, and for each whether the assistant said it."""

    ids: tuple[int, ...]
    said: tuple[bool, ...]


def encode_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
) -> Turns:
    """Encode a conversation by the tokenizer's own template (ChatML if it has none).

    Args:
        messages, tools: see `plait.text.chat.render`.

    Raises: ValueError naming the message: no assistant in it, broken fields, or a template that writes earlier turns
        differently once others follow, as those do that drop old reasoning.
    """
    template = tokenizer.chat_template or CHATML
    bos = None if tokenizer.bos_id is None else tokenizer.token_of(tokenizer.bos_id)
    eos = tokenizer.token_of(tokenizer.eos_ids[0]) if tokenizer.eos_ids else None

    def text_of(n: int, opens: bool = False) -> str:
        return render(messages[:n], template, tools=tools, add_generation_prompt=opens, bos=bos or "", eos=eos or "")

    whole = text_of(len(messages))
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked, answered = text_of(i, opens=True), text_of(i + 1)
        if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= done):
            raise ValueError(
                f"messages[{i}] (assistant): the chat template writes it differently once other turns follow, or not "
                "after the opening it gives; train on a template whose turns only grow, or on conversations of one turn"
            )
        said = answered[len(asked) :].rstrip()
        pieces += [(whole[done : len(asked)], False), (said, True)]
        done = len(asked) + len(said)
    if not pieces:
        raise ValueError("no message has the role assistant: nothing to learn from; add an answer, or leave it out")
    pieces.append((whole[done:], False))
    encoded = [(tokenizer.encode(text), said) for text, said in pieces if text]
    return Turns(
        ids=tuple(token for ids, _ in encoded for token in ids),
        said=tuple(said for ids, said in encoded for _ in ids),
    )
