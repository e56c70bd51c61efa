"""What a request may ask for besides tokens, through the engine: reasoning, constraints, log-probabilities."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from plait.engine.constraint import Constraint
from plait.engine.engine import Engine
from plait.engine.request import FinishReason, Logprob, Request, Sampling, Usage
from plait.model.hybrid import Hybrid
from plait.text.tokenizer import Tokenizer


@dataclass
class Got:
    """All that came of one answer."""

    text: str = ""
    reasoning: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


def run(engine: Engine, requests: list[Request]) -> list[list[Got]]:
    handles = [engine.submit(request) for request in requests]
    got = {id(handle): [Got() for _ in range(handle.request.n)] for handle in handles}
    while engine.has_work():
        for delta in engine.step():
            answer = got[id(delta.handle)][delta.index]
            assert answer.reason is None
            answer.text += delta.text
            answer.reasoning += delta.reasoning
            answer.ids += delta.token_ids
            answer.logprobs += delta.logprobs or ()
            answer.reason, answer.usage, answer.error = delta.finish_reason, delta.usage, delta.error
    return [got[id(handle)] for handle in handles]


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Hybrid], tokenizer: Tokenizer) -> Iterator[Engine]:
    made = Engine(tiny("M*-"), tokenizer, max_batch=8)
    yield made
    made.grammars.close()


def test_budgets_hold_in_batches_of_several_answers_and_an_answer_always_comes(
    engine: Engine, tokenizer: Tokenizer, n_shapes: int
) -> None:
    rng = random.Random(0)
    newline, (end,) = tokenizer.encode("\n")[0], tokenizer.eos_ids
    requests, budgets = [], []
    for _ in range(200 if n_shapes > 20 else 5):
        budget = int(rng.choice([0, rng.uniform(0, 30), rng.uniform(0, 200)]))
        bias = {newline: rng.choice([-100, 1, 4]), end: rng.choice([-100, 0, 5])}
        s = Sampling(
            max_tokens=budget + rng.choice([30, 800]),
            logit_bias=bias,
            seed=rng.randrange(99),
            stop=rng.choice([(), ("a", "</think>")]),
        )
        prompt = tokenizer.encode(rng.choice(["so\n<think>\n", "why\n<think>"]))
        requests.append(
            Request(prompt_ids=tuple(prompt), sampling=s, n=rng.choice([1, 3]), thinking_token_budget=budget)
        )
        budgets.append(budget)
    for answers, budget in zip(run(engine, requests), budgets, strict=True):
        for got in answers:
            assert got.usage is not None and got.error is None
            assert got.usage.reasoning_tokens <= budget + 500
            assert "</think>" not in got.reasoning
            assert got.text.strip() or got.reason is FinishReason.STOP
            assert len(got.ids) == got.usage.completion_tokens > got.usage.reasoning_tokens
            # the reasoning that is told is that of the tokens that are counted, but for a newline before the mark
            told = tokenizer.decode(got.ids[: got.usage.reasoning_tokens]).lstrip()
            assert got.reasoning in (told, told + "\n")


def test_answers_differ_from_each_other_and_not_from_themselves_in_another_batch(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("so\n<think>\n")
    s = Sampling(max_tokens=40, seed=3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={300: 2.0})
    asked = Request(prompt_ids=tuple(prompt), sampling=s, n=3, thinking_token_budget=10)
    other = Request(prompt_ids=tuple(prompt[:2]), sampling=Sampling(max_tokens=25))
    (alone,) = run(engine, [asked])
    _, together, _ = run(engine, [other, asked, other])
    assert [got.ids for got in alone] == [got.ids for got in together]
    assert len({tuple(got.ids) for got in alone}) == 3


def test_the_answer_obeys_and_the_reasoning_is_free(engine: Engine, tokenizer: Tokenizer) -> None:
    regex = Constraint("regex", "(yes|no), [0-9]{2,4}!")
    prompts = [tokenizer.encode(text) for text in ("so\n<think>\n", "so\n", "so <think></think>")]
    requests = [
        Request(
            prompt_ids=tuple(prompt),
            sampling=Sampling(max_tokens=900, seed=seed),
            constraint=regex,
            thinking_token_budget=20,
            n=2,
        )
        for seed, prompt in enumerate(prompts)
    ]
    for answers, prompt in zip(run(engine, requests), prompts, strict=True):
        for got in answers:
            assert got.reason is FinishReason.STOP and re.fullmatch(regex.text, got.text)
            assert bool(got.reasoning) == (prompt is prompts[0]) or prompt is prompts[1]


def test_a_constraint_that_fails_ends_its_own_answer_only(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    regex, prompt = Constraint("regex", "[a-z]{300}"), tokenizer.encode("so")
    s = Sampling(max_tokens=20, seed=1)
    (expected,) = run(engine, [Request(prompt_ids=tuple(prompt), sampling=s, thinks=False)])
    failing = Request(prompt_ids=tuple(prompt), sampling=s, constraint=regex)
    handle = engine.submit(failing)
    fine = engine.submit(Request(prompt_ids=tuple(prompt), sampling=s, thinks=False))
    grammar = handle.sequences[0].row.draw.grammar
    assert grammar is not None
    monkeypatch.setattr(grammar, "allowed", lambda: setattr(grammar, "failure", "too much"))
    ended = {}
    while engine.has_work():
        for delta in engine.step():
            if delta.finish_reason is not None:
                ended[delta.handle.request_id] = (delta.finish_reason, delta.error)
    assert ended[handle.request_id] == (FinishReason.ERROR, "too much")
    assert ended[fine.request_id][0] is FinishReason.LENGTH
    assert fine.sequences[0].row.ids == expected[0].ids


def test_logprobs_come_with_their_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    asked = Request(
        prompt_ids=tuple(tokenizer.encode("so")), sampling=Sampling(max_tokens=9, seed=1, logprobs=2), thinks=False
    )
    plain = Request(prompt_ids=tuple(tokenizer.encode("so")), sampling=Sampling(max_tokens=9, seed=1), thinks=False)
    (got,), (bare,) = run(engine, [asked, plain])
    assert [told.token_id for told in got.logprobs] == got.ids == bare.ids
    assert all(len(told.top) == 2 and told.logprob <= told.top[0][1] for told in got.logprobs)
    assert bare.logprobs == []


def test_what_is_no_constraint_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="constraint='x'"):
        engine.submit(Request(prompt_ids=(1,), constraint="x"))
    with pytest.raises(ValueError, match=r"constraint: the regex cannot be used"):
        engine.submit(Request(prompt_ids=(1,), constraint=Constraint("regex", "(")))
