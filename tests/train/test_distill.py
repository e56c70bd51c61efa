"""Distillation as an objective: what it minimises, what it leaves alone, and that a run with it resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, config, equal, weights
from tests.train.tiny import VOCAB, objective, tiny_config, tiny_model

from plait.data.packing import IGNORED
from plait.data.shards import Dataset
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.train.distill import Distill, Streams
from plait.train.loop import train
from plait.train.metrics import StepFacts
from plait.train.objective import mean_loss


def test_the_loss_is_the_mixture_over_the_counted_tokens_in_float64(words: Dataset) -> None:
    student, teacher, goal = tiny_model("M-*-"), tiny_model("M*", seed=7), objective(words)
    (batch,) = goal.batches(0)
    taught = Distill(goal, teacher, share=0.75, temperature=2.0)
    found = taught.loss(student, batch, 1.0)
    counted = batch.targets != IGNORED
    with torch.no_grad():
        z, t = (m(batch.ids, starts=batch.starts).logits[counted].double() for m in (student, teacher))
    p, q = (x / 2.0 for x in (t, z))
    kl = 4.0 * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    ce = torch.nn.functional.cross_entropy(z, batch.targets[counted], reduction="sum")
    assert float(found.metrics["divergence"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(found.metrics["cross_entropy"]) == pytest.approx(float(ce), rel=1e-5)
    assert float(found.value.detach()) == pytest.approx(float(0.75 * kl + 0.25 * ce), rel=1e-5)
    assert found.tokens == int(counted.sum())
    found.value.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_validation_is_plain_cross_entropy(words: Dataset) -> None:
    student, goal = tiny_model(), objective(words)
    taught = Distill(goal, tiny_model(seed=3))
    assert mean_loss(student, taught, taught.validation()) == mean_loss(student, goal, goal.validation())


def test_a_student_comes_close_to_its_teacher(words: Dataset) -> None:
    teacher, student, seen = tiny_model(), tiny_model(seed=3), []
    train(teacher, objective(words), config(steps=60))
    before = weights(teacher)
    taught = Distill(objective(words), teacher)
    out = train(student, taught, config(steps=60), on_step=lambda facts: seen.append(facts.metrics["divergence"]))
    assert seen[-1] < 0.2 * seen[0]
    assert equal(weights(teacher), before)
    assert out.validation_loss is not None
    assert out.validation_loss < mean_loss(teacher, taught, taught.validation()) + 0.3


def test_a_killed_run_goes_on_with_the_same_bits_and_refuses_another_teacher(words: Dataset, tmp_path: Path) -> None:
    teacher = tiny_model(seed=9)

    def taught(name: str = "nine", share: float = 0.5) -> Distill:
        return Distill(objective(words, accumulate=2), teacher, share=share, name=name)

    facts: list[StepFacts] = []
    whole, first, second = tiny_model(), tiny_model(), tiny_model(seed=5)
    train(whole, taught(), config(steps=6), on_step=facts.append)
    # both parts are told as means per token
    for fact in facts:
        mixed = 0.5 * fact.metrics["divergence"] + 0.5 * fact.metrics["cross_entropy"]
        assert fact.loss == pytest.approx(mixed, rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        train(first, taught(), config(steps=6), tmp_path, on_step=Stop(3))
    with pytest.raises(ValueError, match=r"teacher was 'nine' and is 'ten'"):
        train(second, taught("ten"), config(steps=6), tmp_path)
    with pytest.raises(ValueError, match=r"share was 0.5 and is 0.25"):
        train(second, taught(share=0.25), config(steps=6), tmp_path)
    train(second, taught(), config(steps=6), tmp_path)
    assert equal(weights(whole), weights(second))


def test_what_cannot_teach_is_refused(words: Dataset) -> None:
    goal, student = objective(words), tiny_model()
    larger = ModelConfig.from_pattern("-", vocab_size=VOCAB + 1, d_model=32, mlp={"d_ff": 8})
    with pytest.raises(ValueError, match="vocabulary of 64, teacher .* over 65"):
        Distill(goal, build(larger, "fp32")).loss(student, goal.batches(0)[0], 1.0)
    with pytest.raises(ValueError, match="share=-1.0"):
        Distill(goal, student, share=-1.0)
    with pytest.raises(ValueError, match="temperature=0.0"):
        Distill(goal, student, temperature=0.0)


def test_streams_are_nothing_for_a_part_that_was_cut_out_unchanged(words: Dataset) -> None:
    teacher, goal = tiny_model(), objective(words)
    (batch,) = goal.batches(0)
    streams = Streams(weight=0.5, pairs=((1, 1), (4, 4)))
    same = Distill(goal, teacher, streams=streams).loss(tiny_model().requires_grad_(), batch, 1.0)
    assert float(same.metrics["streams"]) == 0
    other = tiny_model(seed=3)
    found = Distill(goal, teacher, streams=streams).loss(other, batch, 1.0)
    plain = Distill(goal, teacher).loss(other, batch, 1.0)
    assert float(found.value.detach()) == pytest.approx(
        float(plain.value.detach()) + 0.5 * float(found.metrics["streams"]), rel=1e-6
    )


def test_streams_compare_the_kept_channels_of_the_paired_layers(words: Dataset) -> None:
    teacher, goal = tiny_model("M-*-"), objective(words)
    narrow = replace(tiny_config("M-"), d_model=3)
    student, (batch,) = build(narrow, "fp32", seed=2), goal.batches(0)
    channels = (30, 2, 7)
    goal_of = Distill(goal, teacher, streams=Streams(weight=1.0, pairs=((1, 2), (2, 4)), channels=channels))
    found = goal_of.loss(student, batch, 0.25)
    counted = batch.targets != IGNORED
    with torch.no_grad():
        x, y = (m(batch.ids, starts=batch.starts, output_hidden_states=True).hidden_states for m in (student, teacher))
    by_hand = 0.0
    for i, j in ((1, 2), (2, 4)):
        for ours, theirs in zip(x[i][counted].double(), y[j][counted].double(), strict=True):
            theirs = theirs[list(channels)]
            by_hand += float((ours - theirs).square().sum() / theirs.square().sum()) / 2
    assert float(found.metrics["streams"]) == pytest.approx(0.25 * by_hand, rel=1e-5)
    found.value.backward()
    assert goal_of.identity() != Distill(goal, teacher).identity()
    for wrong in (Streams(weight=1.0, pairs=((3, 2),), channels=channels), Streams(weight=1.0, pairs=((1, 1),))):
        with pytest.raises(ValueError, match="pairs: |channels: "):
            Distill(goal, teacher, streams=wrong).loss(student, batch, 1.0)
    with pytest.raises(ValueError, match="weight=-1"):
        Streams(weight=-1.0, pairs=((1, 1),))
