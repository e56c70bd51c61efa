"""The sampler: its filters equal the warpers of transformers, its draws follow the distribution and only the seed."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plait.engine.request import Sampling
from plait.engine.sampler import Draw, filtered, sample, uniform

SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=20),
    Sampling(top_k=1),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(temperature=2.0, top_p=0.05),
    Sampling(min_p=0.1),
    Sampling(temperature=1.7, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    Sampling(temperature=0.5, top_k=9, top_p=0.7, repetition_penalty=0.8),
]


def draw(sampling: Sampling, ids: list[int], vocab_size: int) -> Draw:
    return Draw(sampling, ids, vocab_size, torch.device("cpu"))


def theirs(logits: torch.Tensor, ids: list[int], s: Sampling) -> torch.Tensor:
    chain = LogitsProcessorList()
    if s.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k is not None:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p is not None:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p is not None:
        chain.append(MinPLogitsWarper(s.min_p))
    return chain(torch.tensor([ids]), logits)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_filters_equal_those_of_transformers(s: Sampling) -> None:
    for _ in range(20):
        logits = torch.randn(1, 211) * 4
        ids = torch.randint(0, 211, (30,)).tolist()
        ours = filtered(draw(s, ids, 211).adjusted(logits[0])[None], s)
        expected = theirs(logits, ids, s)
        assert torch.equal(ours.isinf(), expected.isinf())
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 9.0])
@pytest.mark.parametrize("top_p", [0.2, 0.95, 0.9999])
def test_top_p_over_a_large_vocabulary_equals_transformers(scale: float, top_p: float) -> None:
    # flat rows need more than the head that is looked at first, steep ones less; both in one batch
    logits = torch.cat([torch.randn(1, 5000) * scale, torch.randn(1, 5000) * 6])
    logits += torch.arange(5000) * 1e-5
    s = Sampling(top_p=top_p)
    ours, expected = filtered(logits, s), theirs(logits, [1], s)
    # sums of thousands of float32 probabilities may put the edge a token, or a mass of 1e-5, further
    apart = torch.where(ours.isinf() != expected.isinf(), logits.softmax(-1), 0.0)
    assert (apart.sum(-1) <= apart.amax(-1) + 1e-5).all()
    assert ours.isfinite().any(-1).all()


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 12) * 2
    s = Sampling(temperature=0.9, top_k=8, seed=5)
    p = filtered(logits, s).softmax(-1)[0].tolist()
    n = 20_000
    draws = [draw(s, [0] * position, 12) for position in range(n)]
    count = Counter(sample(logits.expand(n, -1), draws))
    # chi-squared over 8 kept tokens: 7 degrees of freedom exceed 24.3 once in a thousand
    assert all(p[token] > 0 for token in count)
    assert sum((count[i] - n * q) ** 2 / (n * q) for i, q in enumerate(p) if q > 0) < 24.3


def test_uniform_numbers_are_uniform_and_unlike_for_near_seeds() -> None:
    rows = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert 0 <= rows.min() and rows.max() < 1
    counts = torch.histc(rows, bins=20, min=0, max=1)
    assert ((counts - 2000).square() / 2000).sum() < 43.8  # 19 degrees of freedom, once in a thousand
    # neighbours in seed and in position are uncorrelated, to four standard errors
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs()
        assert correlation < 4 / math.sqrt(a.numel())


def test_a_seeded_row_gets_its_token_whatever_the_batch_around_it() -> None:
    logits = torch.randn(6, 50) * 3
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(6)]
    settings[2] = Sampling(temperature=0)
    seeded = [
        Sampling(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=9 + i) for i, s in enumerate(settings)
    ]
    ids = [[i, 2, 3] for i in range(6)]
    together = sample(logits, [draw(s, row, 50) for s, row in zip(seeded, ids, strict=True)])
    alone = [sample(logits[i : i + 1], [draw(s, ids[i], 50)])[0] for i, s in enumerate(seeded)]
    assert together == alone
    assert together[2] == logits[2].argmax()


def test_a_row_without_seed_draws_afresh() -> None:
    logits = torch.zeros(64, 1000)
    assert len(set(sample(logits, [draw(Sampling(), [1], 1000) for _ in range(64)]))) > 32


def test_the_penalty_makes_greedy_leave_a_seen_token() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    d = draw(Sampling(temperature=0, repetition_penalty=1.2), [2], 3)
    assert sample(logits, [d]) == [0]
    d.note(0)
    assert sample(logits, [d]) == [1]


@pytest.mark.parametrize("s", [Sampling(temperature=0), Sampling(), Sampling(top_k=3, top_p=0.5)], ids=str)
def test_logits_that_are_no_numbers_are_an_error(s: Sampling) -> None:
    logits = torch.randn(2, 9)
    logits[1, 4] = math.nan
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample(logits, [draw(s, [1], 9), draw(s, [1], 9)])


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, -0.3), (1.5, 2.0)])
def test_presence_and_frequency_are_taken_off_for_tokens_of_the_answer(presence: float, frequency: float) -> None:
    d = draw(Sampling(presence_penalty=presence, frequency_penalty=frequency), [1, 1, 2], 6)
    for token_id in (3, 3, 3, 5):
        d.note(token_id)
    logits = torch.randn(6)
    # the prompt's tokens 1 and 2 do not count
    counts = torch.tensor([0, 0, 0, 3, 0, 1])
    torch.testing.assert_close(d.adjusted(logits), logits - presence * (counts > 0) - frequency * counts)


def test_a_bias_bans_and_forces() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    greedy = Sampling(temperature=0, logit_bias={0: -100, 3: 3.5})
    assert sample(logits, [draw(greedy, [1], 4)]) == [1]
    forced = [draw(Sampling(logit_bias={3: 100}, seed=i), [1], 4) for i in range(50)]
    assert sample(logits.expand(50, -1), forced) == [3] * 50
    with pytest.raises(ValueError, match="logit_bias: there is no token id 4"):
        draw(Sampling(logit_bias={4: 1.0}), [1], 4)


def test_the_batch_around_it_does_not_change_a_row_by_a_bit() -> None:
    # rows so flat that a sum in another order would show in the token now and then
    logits = torch.randn(40, 4099) * 0.01
    settings = [Sampling(seed=i, top_p=0.9 if i % 2 else None, temperature=0.5 + 0.5 * (i % 3)) for i in range(40)]
    draws = [draw(s, [0] * i, 4099) for i, s in enumerate(settings)]
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], [d])[0] for i, d in enumerate(draws)]


def test_answers_to_one_prompt_have_randomness_of_their_own() -> None:
    draws = [Draw(Sampling(seed=3), [1], 1000, torch.device("cpu"), index=i) for i in range(32)]
    ids = sample(torch.zeros(32, 1000), draws)
    assert len(set(ids)) > 25
    assert ids[0] == sample(torch.zeros(1, 1000), [draw(Sampling(seed=3), [1], 1000)])[0]


def test_logprobs_are_of_the_model_before_temperature_filters_penalties_and_bias() -> None:
    logits = torch.randn(2, 50) * 2
    s = Sampling(temperature=0.3, top_k=4, logit_bias={7: 100}, presence_penalty=1.0, logprobs=3, seed=1)
    draws = [draw(s, [1], 50), draw(Sampling(temperature=0), [1], 50)]
    (chosen, _) = sample(logits, draws)
    assert chosen == 7
    expected = logits[0].log_softmax(-1)
    (told,) = draws[0].logprobs
    assert told.token_id == 7
    assert told.logprob == pytest.approx(float(expected[7]), abs=1e-6)
    assert [i for i, _ in told.top] == expected.topk(3).indices.tolist()
    assert [p for _, p in told.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-6)
    assert draws[1].logprobs == []
