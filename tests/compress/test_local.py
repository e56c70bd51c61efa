"""Replacements learn what their layer does: the loss falls, a stopped run ends as it would have, the teacher stays."""

from pathlib import Path

import pytest
import torch
from tests.compress.teachers import batches, checkpoint, teacher

from plait.compress.local import Lessons, listening, teach
from plait.compress.replace import Library, Menu, begun, learnt, library, plain
from plait.compress.score import Scores, score
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint
from plait.model.hybrid import Hybrid

TEXT = batches(6)
Set = tuple[Hybrid, Checkpoint, Scores, Library]


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Set:
    model = teacher("M-*")
    source = checkpoint(model, tmp_path_factory.mktemp("school"))
    return model, source, score(model, TEXT), library(model.config, Menu(d_ff=(0.5,), n_heads=(0.67,), d_state=()))


def step(number: int) -> list[Batch]:
    return [TEXT[(2 * number) % 6], TEXT[(2 * number + 1) % 6]]


def test_every_replacement_comes_nearer_to_its_layer(tmp_path: Path, school: Set) -> None:
    before = [p.clone() for p in school[0].parameters()]
    told = teach(*school, step, tmp_path, Lessons(steps=40, lr=1e-2))
    wanted = [(r.layer, r.name) for row in school[3] for r in row if r.learns]
    assert sorted(told) == sorted(wanted)
    for key, (first, last) in told.items():
        assert last < first and last < 1, key
    assert all(torch.equal(a, b) for a, b in zip(before, school[0].parameters(), strict=True))
    assert not any(block._forward_hooks for block in school[0].blocks)


def test_the_first_loss_is_that_of_the_formula(tmp_path: Path, school: Set) -> None:
    model, source, scores, offered = school
    told = teach(*school, step, tmp_path, Lessons(steps=1))
    for row in offered:
        for r in (r for r in row if r.learns):
            block, losses = begun(source, scores, r, plain(model), 0), []

            def look(layer, x, span, y, r=r, block=block, losses=losses) -> None:  # noqa: ANN001
                if layer == r.layer:
                    losses.append(float((block(x, span) - y).square().sum() / (y - x).square().sum()))

            with torch.no_grad(), listening(model, look):
                for batch in step(0):
                    model.hidden(batch.ids, starts=batch.starts)
            assert told[r.layer, r.name][0] == pytest.approx(sum(losses) / 2, rel=1e-9)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("after", "at_once"), [(3, None), (7, 3000), (13, 3000), (4, 1)])
def test_stopped_and_resumed_they_learn_the_same_bits(
    tmp_path: Path, school: Set, after: int, at_once: int | None
) -> None:
    lessons = Lessons(steps=6, save_every=2, at_once=at_once)
    whole = teach(*school, step, tmp_path / "whole", Lessons(steps=6))
    drawn = 0

    def failing(number: int) -> list[Batch]:
        nonlocal drawn
        drawn += 1
        if drawn > after:
            raise StoppedError
        return step(number)

    with pytest.raises(StoppedError):
        teach(*school, failing, tmp_path / "part", lessons)
    assert teach(*school, step, tmp_path / "part", lessons) == whole
    for row in school[3]:
        for r in (r for r in row if r.learns):
            one, other = (learnt(school[0].config, r, tmp_path / name, plain(school[0])) for name in ("whole", "part"))
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_there_is_not_made_again(tmp_path: Path, school: Set) -> None:
    first = teach(*school, step, tmp_path, Lessons(steps=1))

    def never(number: int) -> list[Batch]:
        raise StoppedError

    assert teach(*school, never, tmp_path, Lessons(steps=1)) == first


def test_the_rate_rises_and_falls() -> None:
    lessons = Lessons(steps=100, lr=1.0)
    rates = [lessons.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="lr=0"):
        Lessons(lr=0)
