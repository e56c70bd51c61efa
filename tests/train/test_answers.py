"""Kept answers teach as the teacher in memory does; writing them resumes, and what does not belong is refused."""

from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, config, equal, weights
from tests.train.tiny import VOCAB, objective, tiny_model

from plait.data.shards import Dataset
from plait.dist import state
from plait.formats.checkpoint import load, save
from plait.train import answers
from plait.train.answers import Answers, ask, write_answers
from plait.train.distill import Distill, DistillAnswers
from plait.train.loop import train
from plait.train.metrics import StepFacts
from plait.train.objective import mean_loss


def test_answers_to_the_whole_vocabulary_teach_as_the_teacher_does(words: Dataset, tmp_path: Path) -> None:
    teacher, goal = tiny_model("M*", seed=7), objective(words, accumulate=2)
    kept = write_answers(tmp_path, goal, teacher, draws=3, k=1000, temperature=2.0)
    assert kept.k == VOCAB and kept.draws == 3
    alone, taught = DistillAnswers(goal, kept, share=0.6), Distill(goal, teacher, share=0.6, temperature=2.0)
    model = tiny_model()
    for batch, plain in zip(alone.batches(2), taught.batches(2), strict=True):
        ours, theirs = alone.loss(model, batch, 0.1), taught.loss(model, plain, 0.1)
        assert ours.tokens == theirs.tokens and alone.size(batch) == taught.size(plain)
        # answers are rounded to float16
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-4, atol=0)
        first, second = (
            torch.cat([g.flatten() for g in torch.autograd.grad(one.value, list(model.parameters()))])
            for one in (ours, theirs)
        )
        assert float((first - second).norm() / second.norm()) < 5e-3


def test_the_likeliest_tokens_and_the_rest_are_the_whole_mass(words: Dataset) -> None:
    (batch,) = objective(words).batches(0)
    teacher = tiny_model()
    found = ask(teacher, batch, k=5, temperature=0.7)
    with torch.no_grad():
        p = (teacher(batch.ids, starts=batch.starts).logits / 0.7).softmax(-1)
    top = p.topk(5).values
    torch.testing.assert_close(found.log_p.float().exp(), top, rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(found.log_rest.float().exp(), 1 - top.sum(-1), rtol=4e-3, atol=1e-6)
    torch.testing.assert_close(p.gather(-1, found.ids.long()), top)


def test_a_student_learns_from_answers_and_validates_on_plain_text(words: Dataset, tmp_path: Path) -> None:
    teacher, student, goal, seen = tiny_model(), tiny_model(seed=3), objective(words), []
    train(teacher, goal, config(steps=40))
    taught = DistillAnswers(goal, write_answers(tmp_path, goal, teacher, draws=40, k=8))
    train(student, taught, config(steps=40), on_step=lambda facts: seen.append(facts.metrics["divergence"]))
    assert seen[-1] < 0.3 * seen[0]
    assert mean_loss(student, taught, taught.validation()) == mean_loss(student, goal, goal.validation())


def test_writing_goes_on_where_it_was_stopped(words: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PART", 2)
    teacher, goal = tiny_model(seed=4), objective(words)
    whole = write_answers(tmp_path / "whole", goal, teacher, draws=5, k=6)

    def stop(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    torn = tmp_path / "torn"
    with pytest.raises(KeyboardInterrupt):
        write_answers(torn, goal, teacher, draws=5, k=6, on_draw=stop)
    with pytest.raises(ValueError, match="draws-000004 is missing"):
        Answers(torn)
    before = (torn / "draws-000000" / "answers.safetensors").stat().st_mtime_ns
    again = write_answers(torn, goal, teacher, draws=5, k=6)
    assert (torn / "draws-000000" / "answers.safetensors").stat().st_mtime_ns == before
    for draw in range(5):
        (a,), (b,) = whole.of(draw), again.of(draw)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "log_p", "log_rest"))
    assert all(state.is_whole(path) for path in torn.glob("draws-*"))
    # longer than before: the last part was not full
    assert write_answers(torn, goal, teacher, draws=6, k=6).draws == 6


def test_a_killed_run_goes_on_with_the_same_bits(words: Dataset, tmp_path: Path) -> None:
    kept = write_answers(tmp_path / "answers", objective(words), tiny_model(seed=9), draws=4, k=8)

    def taught(share: float = 0.5) -> DistillAnswers:
        return DistillAnswers(objective(words), Answers(kept.folder), share=share)

    whole, first, second = tiny_model(), tiny_model(), tiny_model(seed=5)
    facts: list[StepFacts] = []
    # six steps of answers to four draws: the first two come again
    train(whole, taught(), config(steps=6), on_step=facts.append)
    with pytest.raises(KeyboardInterrupt):
        train(first, taught(), config(steps=6), tmp_path / "run", on_step=Stop(3))
    with pytest.raises(ValueError, match=r"share was 0.5 and is 0.25"):
        train(second, taught(0.25), config(steps=6), tmp_path / "run")
    train(second, taught(), config(steps=6), tmp_path / "run")
    assert equal(weights(whole), weights(second))
    for fact in facts:
        mixed = 0.5 * fact.metrics["divergence"] + 0.5 * fact.metrics["cross_entropy"]
        assert fact.loss == pytest.approx(mixed, rel=1e-5)


@pytest.mark.parametrize("recipe", ["int8-32", "fp8"])
def test_a_teacher_in_few_bits_answers_nearly_as_it_does_in_many(words: Dataset, tmp_path: Path, recipe: str) -> None:
    teacher, goal = tiny_model(), objective(words)
    train(teacher, goal, config(steps=40))
    save(teacher, tmp_path / "teacher", format="native")
    small = load(tmp_path / "teacher", recipe=recipe)
    (batch,) = goal.batches(0)
    exact, found = (Distill(goal, one).loss(tiny_model(seed=3), batch, 1.0).value for one in (teacher, small))
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert (
        Distill(goal, small).loss(teacher.requires_grad_(), batch, 1.0).metrics["divergence"] < 0.02 * batch.ids.numel()
    )
    write_answers(tmp_path / "answers", goal, small, draws=1, k=8)


def test_what_does_not_belong_is_refused(words: Dataset, tmp_path: Path) -> None:
    teacher, goal = tiny_model(), objective(words)
    kept = write_answers(tmp_path, goal, teacher, draws=1, k=4, name="first")
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        DistillAnswers(objective(words, seed=1), kept)
    with pytest.raises(ValueError, match="teacher was 'first' and is 'second'"):
        write_answers(tmp_path, goal, teacher, draws=1, k=4, name="second")
    with pytest.raises(ValueError, match="k was 4 and is 5"):
        write_answers(tmp_path, goal, teacher, draws=1, k=5, name="first")
    with pytest.raises(ValueError, match="k=0, draws=1"):
        write_answers(tmp_path / "other", goal, teacher, draws=1, k=0)
    with pytest.raises(ValueError, match="tells of no answers"):
        Answers(tmp_path / "nowhere")
    path = tmp_path / "draws-000000" / "answers.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="is damaged"):
        Answers(tmp_path).of(0)
