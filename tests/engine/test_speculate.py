"""Guessed tokens change nothing but the time: the same tokens for every seed and setting, and the same distribution."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from plait.engine import chain, core
from plait.engine.constraint import Constraint
from plait.engine.core import Limits
from plait.engine.engine import Engine
from plait.engine.request import Load, Request, Sampling
from plait.engine.sampler import Draw, sample
from plait.engine.speculate import Lookup, SmallModel, verified
from plait.model.hybrid import Hybrid
from plait.text.tokenizer import Tokenizer

Tiny = Callable[..., Hybrid]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Hybrid:
    return tiny("M-M*-M", init_std=0.3)


def requests(tokenizer: Tokenizer, n: int) -> list[Request]:
    """Prompts that repeat themselves, under all kinds of settings."""
    rng = random.Random(4)
    found = []
    for i in range(n):
        text = rng.choice(["the quick brown fox ", "ab ", "jumps over the lazy dog; "]) * rng.randrange(1, 9)
        prompt = tuple(tokenizer.encode(text + rng.choice(["", "<think>\n"])))
        s = Sampling(
            max_tokens=rng.randrange(1, 60),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            top_p=rng.choice([None, 0.9]),
            seed=i,
            repetition_penalty=rng.choice([1.0, 1.0, 0.8]),
            presence_penalty=rng.choice([0.0, 0.5]),
            stop=rng.choice([(), ("a",)]),
            logprobs=rng.choice([None, 1]),
            ignore_eos=rng.random() < 0.5,
        )
        constraint = Constraint("regex", "(the fox, )*!") if i % 7 == 6 else None
        budget = rng.choice([None, 0, 7]) if s.max_tokens > 20 else None
        found.append(
            Request(
                prompt_ids=prompt,
                sampling=s,
                n=rng.choice([1, 1, 3]),
                thinking_token_budget=budget,
                constraint=constraint,
                thinks=None if prompt[-1] != prompt[0] else False,
            )
        )
    return found


def answers(engine: Engine, asked: Sequence[Request], spread: int) -> tuple[list[list[tuple[object, ...]]], Load]:
    """Ids, texts, reasons and log-probabilities of all answers; requests come every few steps."""
    handles, waiting = [], list(asked)
    for step in range(100_000):
        if waiting and step % spread == 0:
            handles.append(engine.submit(waiting.pop(0)))
        engine.step()
        if not waiting and not engine.has_work():
            break
    engine.core.pool.check([], engine.core.prefixes.snapshots())
    rows = [[s.row for s in handle.sequences] for handle in handles]
    made = [[(r.ids, r.pieces, r.thoughts, r.reason, r.error, r.draw.logprobs) for r in some] for some in rows]
    return made, engine.load()


def limits(guesses: int) -> Limits:
    return Limits(max_running=4, cache_bytes=1 << 22, prefix_bytes=1 << 20, guesses=guesses)


def let_know(
    monkeypatch: pytest.MonkeyPatch, asked: Sequence[Request], expected: list[list[tuple[object, ...]]]
) -> None:
    """Give look-ups that know the answers, half of them, and then a wrong token."""
    whole = [[*r.prompt_ids, *row[0]] for r, rows in zip(asked, expected, strict=True) for row in rows]  # type: ignore[misc]

    def propose(_: Lookup, ids: list[int], n: int) -> list[int]:
        found = next(some for some in whole if some[: len(ids)] == ids)
        return [*found[len(ids) : len(ids) + n // 2], 383][:n]

    monkeypatch.setattr(Lookup, "propose", propose)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("spread", [1, 40])
def test_the_tokens_are_those_that_come_without_guessing(
    model: Hybrid, tokenizer: Tokenizer, spread: int, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(tokenizer, 16)
    plain, guessing = (Engine(model, tokenizer, limits=limits(n)) for n in (0, 7))
    expected, _ = answers(plain, asked, 1)
    if knows:
        let_know(monkeypatch, asked, expected)
    got, load = answers(guessing, asked, spread)
    assert got == expected
    assert load.guessed > load.guessed_right > (50 if knows else 0)


@pytest.mark.parametrize("same", [True, False])
def test_a_smaller_model_guesses(tiny: Tiny, model: Hybrid, tokenizer: Tokenizer, same: bool) -> None:
    asked = requests(tokenizer, 8)
    draft = model if same else tiny("M*", seed=1)
    expected, _ = answers(Engine(model, tokenizer, limits=limits(0)), asked, 1)
    guessing = Engine(model, tokenizer, limits=limits(4), draft=draft)
    got, load = answers(guessing, asked, 100)
    assert got == expected
    # its guesses are before penalties and constraints
    assert load.guessed_right > 0.5 * load.guessed if same else load.guessed > load.guessed_right


@pytest.mark.parametrize("pattern", ["M-M*-M", "M*", "MM", "*-"])
def test_without_native_steps_states_go_back_all_the_same(
    tiny: Tiny, tokenizer: Tokenizer, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [r for r in requests(tokenizer, 16) if not r.sampling.temperature and not r.constraint]
    model = tiny(pattern)
    expected, _ = answers(Engine(model, tokenizer, limits=limits(0)), asked, 1)
    for place in (chain, core):
        monkeypatch.setattr(place, "step_rows", lambda *_: None)
    let_know(monkeypatch, asked, expected)
    got, load = answers(Engine(model, tokenizer, limits=limits(6)), asked, 5)
    # log-probabilities agree up to rounding only
    assert [[row[:5] for row in rows] for rows in got] == [[row[:5] for row in rows] for rows in expected]
    assert load.guessed > load.guessed_right > 0


def test_guessing_keeps_the_distribution() -> None:
    """Two tokens of a chain behind guesses of all kinds: 15 degrees of freedom exceed 37.7 once in a thousand."""
    torch.manual_seed(1)
    table = torch.randn(4, 4) * 1.5
    s, n = Sampling(temperature=0.8), 3000
    draws = [Draw(s, [0] * (i % 50), 4, torch.device("cpu")) for i in range(n)]
    rng = random.Random(0)
    # the likely and the unlikely, too short and too long
    guesses = [[rng.randrange(4) for _ in range(rng.choice([0, 1, 1, 2, 3]))] for _ in range(n)]
    fed = [[1, *some] for some in guesses]
    made: list[list[int]] = [[] for _ in range(n)]

    def take(i: int, token_id: int | None) -> bool:
        assert token_id is not None
        made[i].append(token_id)
        draws[i].note(token_id)
        return True

    taken = verified(
        table[[token for some in fed for token in some]],
        guesses,
        draw=lambda some, logits: list(sample(logits, [draws[i] for i in some])),
        take=take,
    )
    assert taken == [len(ids) for ids in made]
    assert all(ids[:-1] == some[: len(ids) - 1] for ids, some in zip(made, guesses, strict=True))
    # those whose guesses ended early go on without
    for i, ids in enumerate(made):
        if len(ids) < 2:
            take(i, sample(table[ids[-1]][None], [draws[i]])[0])
    p = (table / 0.8).softmax(-1)
    count = Counter(tuple(ids[:2]) for ids in made)
    chi = sum(
        (count[a, b] - n * q) ** 2 / (n * q) for a in range(4) for b in range(4) if (q := float(p[1, a] * p[a, b]))
    )
    assert chi < 37.7


def test_lookup_gives_what_followed_and_wants_as_many_as_were_right() -> None:
    lookup = Lookup(least=2, most=3)
    ids = [1, 2, 3, 4, 5, 9, 2, 3]
    assert lookup.propose(ids, 8) == [4, 5]
    lookup.judge(2, 2)
    assert lookup.propose(ids, 8) == [4, 5, 9, 2]
    lookup.judge(4, 1)
    assert lookup.propose(ids, 8) == [4]
    assert lookup.propose([*ids, 7], 8) == []
    # the longer run wins over the later one
    assert lookup.propose([*ids, 7, 2, 3, 8, 1, 2, 3], 8) == [4]


def test_lookup_goes_on_with_what_repeats_itself() -> None:
    lookup = Lookup()
    lookup.judge(1, 1)
    lookup.judge(1, 1)
    assert lookup.propose([5, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_lookup_asks_for_longer_runs_where_its_guesses_are_wrong() -> None:
    lookup, ids = Lookup(least=2, most=3), [1, 2, 3, 4, 5, 9, 2, 3]
    assert lookup.propose(ids, 8) == [4, 5]
    lookup.judge(2, 0)
    assert lookup.propose(ids, 8) == []
    assert lookup.propose([*ids, 6, 1, 2, 3], 8) == [4]
    lookup.judge(1, 1)
    assert lookup.propose([*ids, 6, 1, 2, 3, 4, 5, 7, 2, 3], 8) == [4, 5]


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Tiny, model: Hybrid) -> None:
    with pytest.raises(ValueError, match="draft: it has 100 ids, the model 384"):
        Engine(model, draft=tiny("M", vocab_size=100))
    with pytest.raises(ValueError, match="guesses=-1"):
        Limits(guesses=-1)


def test_a_draft_model_that_is_broken_costs_no_answer(tiny: Tiny, tokenizer: Tokenizer, model: Hybrid) -> None:
    draft = tiny("M*", seed=1)
    with torch.no_grad():
        next(iter(draft.parameters())).fill_(float("nan"))
    asked = Request(prompt_ids=(1, 2, 3), sampling=Sampling(max_tokens=8, temperature=0.0, ignore_eos=True))
    answers = []
    for engine in (Engine(model, tokenizer), Engine(model, tokenizer, limits=Limits(guesses=4), draft=draft)):
        engine.submit(asked)
        ids: list[int] = []
        while engine.has_work():
            ids += [i for delta in engine.step() for i in delta.token_ids]
        answers.append(ids)
    assert answers[0] == answers[1] and len(answers[0]) == 8


def test_a_small_model_reads_a_long_text_in_pieces(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = tiny("M*"), []
    ids = [i % 300 for i in range(1100)]
    draw = Draw(Sampling(temperature=0.0), ids, 384, model.device)
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **more: (lengths.append(ids.shape[1]), hidden(ids, **more))[1])
    guesses = SmallModel(model, draw).propose(ids, 3)
    assert max(lengths) <= 512 and sum(lengths) == len(ids)
    wanted = next(Engine(model).generate(ids, Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)))
    assert guesses == wanted.token_ids
