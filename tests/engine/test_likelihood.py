"""Log-probabilities of continuations: those of a table that was written by hand, and of one sequence at a time."""

import math
import random

import pytest
import torch
from torch import nn

from plait.engine.likelihood import Likelihood, Question, likelihoods
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build

# p(next | token) of three letters
TABLE = [[0.5, 0.25, 0.25], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]]
HYBRID = ModelConfig.from_pattern(
    "M-*E",
    vocab_size=97,
    d_model=48,
    mamba2={"n_heads": 6, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 12},
    mlp={"d_ff": 96},
    moe={"n_experts": 4, "n_chosen": 2, "d_ff": 32},
    max_context=64,
)


def bigrams(table: list[list[float]]) -> Hybrid:
    """A model whose next token depends on the last one alone, as a table says."""
    n = len(table)
    model = build(ModelConfig.from_pattern("-", vocab_size=n, d_model=n, mlp={"d_ff": 1}, norm_eps=1e-12), "fp32")
    assert model.head is not None
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(n))
        # the final norm gives sqrt(n) for the token's own channel
        model.head.weight.copy_(torch.tensor(table).log().T / math.sqrt(n))
        for parameter in model.blocks[0].mixer.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)
    return model


def test_log_probabilities_are_those_computed_by_hand() -> None:
    questions = [
        Question(context=(0,), continuation=(0,)),
        Question(context=(2, 0), continuation=(1, 1, 2)),
        Question(context=(1,), continuation=(1, 1)),
        Question(context=(0, 0, 0, 1), continuation=(0, 2)),
        Question(context=(2,), continuation=(1,)),
    ]
    by_hand = [0.5, 0.25 * 0.7 * 0.2, 0.7 * 0.7, 0.1 * 0.25, 0.25]
    found = likelihoods(bigrams(TABLE), questions)
    assert [math.exp(one.logprob) for one in found] == pytest.approx(by_hand, rel=1e-5)
    assert [one.tokens for one in found] == [1, 3, 2, 2, 1]
    assert [one.greedy for one in found] == [True, False, True, False, False]


@pytest.mark.parametrize("batch_tokens", [1, 70, 4096])
def test_a_batch_scores_like_one_sequence_at_a_time(batch_tokens: int) -> None:
    model, rng = build(HYBRID, "fp32").eval(), random.Random(0)
    questions = [
        Question(
            context=tuple(rng.randrange(97) for _ in range(rng.randint(1, 40))),
            continuation=tuple(rng.randrange(97) for _ in range(rng.randint(1, 9))),
        )
        for _ in range(23)
    ]
    done: list[int] = []
    found = likelihoods(model, questions, batch_tokens=batch_tokens, progress=done.append)
    assert sum(done) == len(questions)
    for question, one in zip(questions, found, strict=True):
        ids = torch.tensor([question.context + question.continuation])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(question.context) - 1 : -1].double().log_softmax(-1)
        wanted = torch.tensor(question.continuation)
        # float32 sums of a padded batch are in another order
        assert one.logprob == pytest.approx(float(logprobs.gather(1, wanted[:, None]).sum()), rel=1e-5)
        assert one.greedy == bool((logprobs.argmax(-1) == wanted).all())


def test_a_question_longer_than_the_context_loses_its_beginning() -> None:
    model, ids = build(HYBRID, "fp32").eval(), tuple(i % 97 for i in range(100))
    cut = likelihoods(model, [Question(context=ids[:95], continuation=ids[95:])])
    # 64 tokens predict, the last of the 65 is only predicted
    assert cut == likelihoods(model, [Question(context=ids[35:95], continuation=ids[95:])])
    with pytest.raises(ValueError, match=r"questions\[0\]: a continuation of 65 tokens; the context is 64"):
        likelihoods(model, [Question(context=(1,), continuation=ids[:65])])


def test_a_tied_head_and_codes_are_scored_too() -> None:
    question = [Question(context=(3, 4), continuation=(5, 6))]
    for recipe, ties in (("fp32", True), ("int8-32", False)):
        config = ModelConfig.from_pattern("-", vocab_size=64, d_model=64, mlp={"d_ff": 64}, ties_embeddings=ties)
        model = build(config, recipe)
        with torch.no_grad():
            logprobs = model(torch.tensor([[3, 4, 5]])).logits[0, 1:].double().log_softmax(-1)
        expected = float(logprobs[0, 5] + logprobs[1, 6])
        assert likelihoods(model, question)[0].logprob == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation", "token"), [((0,), (1, 3), 3), ((0,), (-1,), -1), ((7, 0), (1,), 7)]
)
def test_ids_outside_the_vocabulary_are_named(
    context: tuple[int, ...], continuation: tuple[int, ...], token: int
) -> None:
    questions = [Question(context=(0,), continuation=(1,)), Question(context=context, continuation=continuation)]
    with pytest.raises(ValueError, match=rf"questions\[1\] holds token id {token}, outside the vocabulary of 3"):
        likelihoods(bigrams(TABLE), questions)


def test_no_questions_have_no_answers_and_empty_ones_are_refused() -> None:
    assert likelihoods(bigrams(TABLE), []) == []
    with pytest.raises(ValueError, match="at least one token"):
        Question(context=(), continuation=(1,))
    assert Likelihood(logprob=0.0, tokens=1, greedy=True).greedy
