"""Conversations: turns are kept, only new tokens are read, and the end of a turn ends an answer."""

from collections.abc import Callable

import pytest
import torch

from plait.engine.conversation import Conversation, end_of_turn
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.engine.session import Session
from plait.model.hybrid import Hybrid
from plait.text.bpe import train_bpe
from plait.text.chat import encode_chat
from plait.text.tokenizer import Tokenizer

Tiny = Callable[..., Hybrid]
GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)


def fluent(model: Hybrid) -> Hybrid:
    """A model that never draws special tokens and single bytes, so that its answers are texts."""
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[:286] = 0
    return model


def talk(conversation: Conversation, text: str) -> tuple[str, int, int]:
    """Say it; the answer, the tokens of the prompt, and those that were not read again."""
    stream = conversation.ask(text)
    shown = "".join(stream)
    done = conversation.settle(stream)
    assert shown == done.text
    return done.text, done.usage.prompt_tokens, done.usage.cached_tokens


def test_every_turn_reads_only_what_is_new(tiny: Tiny, tokenizer: Tokenizer) -> None:
    conversation = Conversation(Engine(fluent(tiny()), tokenizer), GREEDY, system="be brief")
    cached = 0
    for turn in range(4):
        _, n_prompt, n_cached = talk(conversation, f"the fox {turn}")
        assert n_cached == cached
        cached = len(conversation.session.ids)
        assert cached == n_prompt + 15
    roles = [message["role"] for message in conversation.session.messages]
    assert roles == ["system", *["user", "assistant"] * 4]


def test_answers_equal_those_of_a_conversation_read_anew_each_time(tiny: Tiny, tokenizer: Tokenizer) -> None:
    engine = Engine(tiny(), tokenizer)
    kept, fresh = Conversation(engine, GREEDY), Conversation(engine, GREEDY)
    for text in ("the fox", "über die Straße 🐻", "dog"):
        prompt_of_kept = kept.ask(text)
        answer = "".join(prompt_of_kept)
        ids = kept.settle(prompt_of_kept).prompt_ids
        fresh.session.forget()
        assert "".join(engine.stream(ids, GREEDY)) == answer


def test_a_changed_system_text_is_read_from_the_beginning(tiny: Tiny, tokenizer: Tokenizer) -> None:
    conversation = Conversation(Engine(tiny(), tokenizer), GREEDY, system="be brief")
    talk(conversation, "the fox")
    conversation.instruct("be long")
    assert talk(conversation, "and the dog")[2] == 0
    assert conversation.session.messages[0] == {"role": "system", "content": "be long"}
    conversation.instruct("")
    assert conversation.session.messages[0]["role"] == "user"


def test_reset_forgets_turns_and_keeps_the_system_text(tiny: Tiny, tokenizer: Tokenizer) -> None:
    conversation = Conversation(Engine(tiny(), tokenizer), GREEDY, system="be brief")
    first = talk(conversation, "the fox")
    conversation.reset()
    assert conversation.session.ids == []
    assert talk(conversation, "the fox") == first


def test_the_end_of_a_turn_is_a_stop(tokenizer: Tokenizer) -> None:
    assert end_of_turn(tokenizer) == ((tokenizer.id_of("<|im_end|>"),), ())
    # a vocabulary without that token writes it in letters: then it is a stop text
    plain = train_bpe(["some text"] * 3, 300, special_tokens=["<|eos|>"])
    assert end_of_turn(plain) == ((), ("<|im_end|>",))
    bare = train_bpe(["some text"] * 3, 300, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert end_of_turn(bare) == ((), ())


def test_an_answer_ends_with_its_turn(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny()
    free = Conversation(Engine(model, tokenizer), GREEDY)
    answer = free.ask("the fox")
    list(answer)
    # the model's sixth token becomes the end of a turn
    end = answer.completion.token_ids[5]
    name = tokenizer.token_of(end)
    ended = Conversation(Engine(model, tokenizer), GREEDY)
    ended._end_ids = (end,)
    text, _, _ = talk(ended, "the fox")
    ids = answer.completion.token_ids
    assert text == tokenizer.decode(ids[: ids.index(end)]), name


def test_a_refused_turn_is_taken_back(tiny: Tiny) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    strict = train_bpe(["the fox"] * 3, 300, chat_template=template + "{% endfor %}")
    conversation = Conversation(Engine(tiny(), strict), GREEDY)
    talk(conversation, "the fox")
    with pytest.raises(ValueError, match="no"):
        conversation.ask("no")
    assert len(conversation.session.messages) == 2
    talk(conversation, "the fox")


def test_a_chat_needs_a_tokenizer(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Conversation(Engine(tiny()), GREEDY)


def test_ids_as_they_were_drawn_are_kept_where_the_text_agrees(tokenizer: Tokenizer, tiny: Tiny) -> None:
    session = Session([{"role": "user", "content": "the quick"}])
    ids = encode_chat(tokenizer, session.messages)
    # the answer spelt in single bytes, as no encoder would write it
    odd = [i for letter in "fox" for i in tokenizer.encode(letter)]
    assert tokenizer.encode("fox") != odd
    session.ids, session.cache = [*ids, *odd], tiny().cache(1)
    session.messages += [{"role": "assistant", "content": "fox"}, {"role": "user", "content": "dog"}]
    prompt = session.prompt(tokenizer)
    assert prompt[: len(session.ids)] == session.ids
    text = tokenizer.decode(prompt, skip_special=False)
    assert text == tokenizer.decode(encode_chat(tokenizer, session.messages), skip_special=False)


SWITCHED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}{% endif %}"
)


def test_reasoning_is_switched_by_the_template_of_the_model(tiny: Tiny) -> None:
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog. " * 4], 320, chat_template=SWITCHED)
    engine = Engine(fluent(tiny()), tokenizer)
    prompts = {}
    for thinks in (True, False):
        conversation = Conversation(engine, GREEDY, thinks=thinks)
        for turn in range(2):
            stream = conversation.ask("the fox")
            assert "".join(stream) == conversation.settle(stream).text
            prompts[thinks, turn] = tokenizer.decode(stream.completion.prompt_ids, skip_special=False)
    assert [prompts[True, turn].endswith("<|assistant|><think>") for turn in range(2)] == [True, True]
    assert [prompts[False, turn].endswith("<think></think>") for turn in range(2)] == [True, True]


def test_a_model_that_knows_no_reasoning_is_not_asked_for_it(tiny: Tiny, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="thinks=True: the chat template of this model has no switch"):
        Conversation(Engine(tiny(), tokenizer), GREEDY, thinks=True)
