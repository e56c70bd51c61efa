"""Budgets of reasoning: kept to the token, in any vocabulary, and an answer always comes."""

import random

import pytest
import torch

from plait.engine.answer import Answer
from plait.engine.request import Sampling
from plait.engine.sampler import Draw, sample
from plait.engine.thinking import Thoughts, thoughts_of
from plait.text.bpe import SPECIAL_TOKENS, train_bpe
from plait.text.reasoning import Marks, MarkStream
from plait.text.tokenizer import Tokenizer

GRACE = 500  # the papers' number
WORDS = "think of the quick brown fox\nthat jumps over </ the lazy dog >\n\nand so on; " * 3
MARKLESS = tuple(token for token in SPECIAL_TOKENS if "think" not in token)


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_bpe([WORDS], 340, SPECIAL_TOKENS if request.param == "marks are tokens" else MARKLESS)


def reasoned(thoughts: Thoughts, tokenizer: Tokenizer, ids: list[int], ends: frozenset[int]) -> list[int]:
    """Feed drawn ids; what really comes."""
    out = []
    for token_id in ids:
        token_id = thoughts.settled(token_id, ends)
        thoughts.note(token_id)
        out.append(token_id)
    return out


def texts(tokenizer: Tokenizer, ids: list[int], is_open: bool = True) -> tuple[str, str]:
    marks = Marks()
    answer = Answer(MarkStream(tokenizer, (marks.open, marks.close)), marks=marks, is_open=is_open)
    parts = [*(answer.add(i) for i in ids), answer.finish()]
    return "".join(r for r, _ in parts), "".join(a for _, a in parts)


def followed(tokenizer: Tokenizer, **changes: object) -> Thoughts:
    return Thoughts(tokenizer, Marks(), **({"is_open": True} | changes))  # pyright: ignore[reportArgumentType]


def test_reasoning_closes_at_the_next_newline_past_the_budget(tokenizer: Tokenizer) -> None:
    word, newline = tokenizer.encode("quick")[0], tokenizer.encode("\n")[0]
    drawn = [word, newline, word, word, word, word, newline, *[word] * 30]
    thoughts = followed(tokenizer, budget=4)
    ids = reasoned(thoughts, tokenizer, drawn, frozenset())
    assert thoughts.n_tokens == 7
    assert ids[:7] == drawn[:7]
    reasoning, answer = texts(tokenizer, ids)
    piece = tokenizer.decode([word])
    assert reasoning == piece + "\n" + 4 * piece + "\n"
    assert answer.startswith(piece)


def test_without_a_newline_reasoning_ends_after_the_grace(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("quick")[0]
    thoughts = followed(tokenizer, budget=3)
    ids = reasoned(thoughts, tokenizer, [word] * (GRACE + 40), frozenset())
    assert thoughts.n_tokens == 3 + GRACE
    reasoning, answer = texts(tokenizer, ids)
    assert reasoning == tokenizer.decode([word] * (3 + GRACE)) + "\n"
    assert answer == tokenizer.decode([word] * (len(ids) - 3 - GRACE - len(tokenizer.encode("\n</think>\n\n"))))


@pytest.mark.parametrize("is_open", [True, False])
def test_a_budget_of_nothing_closes_at_once(tokenizer: Tokenizer, is_open: bool) -> None:
    word = tokenizer.encode("quick")[0]
    thoughts = followed(tokenizer, budget=0, is_open=is_open)
    opening = [] if is_open else tokenizer.encode("<think>")
    ids = reasoned(thoughts, tokenizer, opening + [word] * 20, frozenset())
    assert thoughts.n_tokens == 0
    assert texts(tokenizer, ids, is_open) == ("", tokenizer.decode([word]) * ids.count(word))
    assert ids.count(word) > 5


def test_the_models_own_end_of_reasoning_counts_and_nothing_is_given(tokenizer: Tokenizer) -> None:
    drawn = tokenizer.encode("the fox\n</think>\n\nthe dog")
    thoughts = followed(tokenizer, budget=100)
    assert reasoned(thoughts, tokenizer, drawn, frozenset()) == drawn
    assert thoughts.n_tokens == len(tokenizer.encode("the fox\n"))
    assert not thoughts.is_open and thoughts.is_over and not thoughts.owes_answer


def test_a_character_that_is_never_ended_is_counted_and_the_mark_is_not(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\u00e9")[0]
    assert tokenizer.decode([half]) == "\ufffd", "the vocabulary must not have this letter"
    thoughts = followed(tokenizer)
    reasoned(thoughts, tokenizer, [*tokenizer.encode("quick"), half, *tokenizer.encode("</think>\n\nfox")], frozenset())
    assert thoughts.n_tokens == len(tokenizer.encode("quick")) + 1


def test_an_end_id_inside_of_reasoning_closes_it(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_ids
    word = tokenizer.encode("quick")[0]
    thoughts = followed(tokenizer)
    ids = reasoned(thoughts, tokenizer, [word, end, *[word] * 30], frozenset({end}))
    assert end not in ids
    assert thoughts.n_tokens == 1
    assert texts(tokenizer, ids)[0] == tokenizer.decode([word]) + "\n"


def test_an_answer_that_is_judged_begins_at_a_token_of_its_own() -> None:
    tokenizer = train_bpe([">quick " * 50 + WORDS], 400, MARKLESS)
    drawn = tokenizer.encode("the fox</think>quick")
    assert tokenizer.token_of(drawn[-1]) == ">quick"
    thoughts = followed(tokenizer, strict=True)
    ids = reasoned(thoughts, tokenizer, drawn, frozenset())
    while thoughts.given:
        ids.append(thoughts.given[0])
        assert not thoughts.note(ids[-1])
    assert tokenizer.decode(ids) == "the fox</think>\n\n"
    assert thoughts.is_over and thoughts.n_tokens == len(tokenizer.encode("the fox"))
    # the model's own mark is followed by the empty line too
    thoughts = followed(tokenizer, strict=True)
    ids = reasoned(thoughts, tokenizer, tokenizer.encode("fox</think>") + drawn[:1] * 2, frozenset())
    assert tokenizer.decode(ids).startswith("fox</think>\n\n")


def test_an_answer_may_begin_without_reasoning(tokenizer: Tokenizer) -> None:
    drawn = tokenizer.encode("\n the fox <think>\n")
    thoughts = followed(tokenizer, is_open=False, budget=0)
    assert reasoned(thoughts, tokenizer, drawn, frozenset()) == drawn
    assert thoughts.n_tokens == 0 and not thoughts.owes_answer


def test_the_prompt_says_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    def of(text: str, **how: object) -> Thoughts | None:
        return thoughts_of(tokenizer, tokenizer.encode(text), **how)  # pyright: ignore[reportArgumentType]

    inside, before = of("assistant\n<think>\n"), of("assistant\n")
    assert inside is not None and inside.is_open
    assert before is not None and not before.is_open
    assert of("<think></think>\n") is None and of("<think>", thinks=False) is None
    told = of("hi", thinks=True)
    assert told is not None and told.is_open


def test_200_random_budgets_are_kept_and_an_answer_always_comes(tokenizer: Tokenizer, n_shapes: int) -> None:
    """Random logits in batches of unlike rows: the reasoning is within budget + 500 tokens, and an answer comes."""
    rng = random.Random(1)
    n_ids, newline = 384, tokenizer.encode("\n")[0]
    ends = frozenset(tokenizer.eos_ids)
    for _ in range(200 if n_shapes > 20 else 6):
        bias = {newline: rng.choice([-100, 0, 3]), **{end: rng.choice([-100, 0, 5]) for end in ends}}
        rows = []
        for index in range(3):
            budget = int(rng.choice([0, 1, rng.uniform(0, 40), rng.uniform(0, 600)]))
            s = Sampling(max_tokens=budget + rng.choice([20, 700, 1100]), logit_bias=bias, seed=rng.randrange(1 << 40))
            prompt = tokenizer.encode(rng.choice(["so\n<think>\n", "so\n<think>"]))
            thoughts = thoughts_of(tokenizer, prompt, budget=budget, max_tokens=s.max_tokens)
            assert thoughts is not None
            is_open = thoughts.is_open
            draw = Draw(s, prompt, n_ids, torch.device("cpu"), index=index, end_ids=ends, thoughts=thoughts)
            rows.append((budget, draw, is_open, ids := []))
        going = list(rows)
        while going:
            drawn = sample(torch.randn(len(going), n_ids), [draw for _, draw, _, _ in going])
            for (_, draw, _, ids), token_id in zip(going, drawn, strict=True):
                ids.append(token_id)
                draw.note(token_id)
            going = [r for r in going if r[3][-1] not in ends and len(r[3]) < r[1].sampling.max_tokens]
        for budget, draw, is_open, ids in rows:
            assert draw.thoughts is not None and draw.thoughts.is_over
            assert draw.thoughts.n_tokens <= budget + GRACE
            reasoning, answer = texts(tokenizer, [i for i in ids if i not in ends], is_open)
            assert "</think>" not in reasoning
            assert answer.strip()
