"""Candidates are ranked by what they predict, and a ranking that was stopped goes on where it was."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.compress.teachers import batches, logits, teacher

from plait.compress.plan import Plan, shrunk
from plait.compress.rank import likeliest, rank, rounds_of
from plait.model.hybrid import Hybrid

TEACHER = teacher("M-*-")
PLANS = [shrunk(TEACHER.config, kept) for kept in ((0, 1, 2, 3), (0, 1, 2), (0, 2), (1, 2, 3), (0,), (3,))]
TEXT = batches(5)


def make(plan: Plan) -> Hybrid:
    """The teacher's layers that a plan keeps."""
    model = teacher("M-*-")
    for new, old in enumerate(plan.kept):
        model.blocks[new] = model.blocks[old]
    model.blocks = model.blocks[: len(plan.kept)]
    return model


def test_shares_and_losses_are_those_of_the_logits(tmp_path: Path) -> None:
    found = rank(TEACHER, PLANS, make, TEXT, tmp_path, keep=len(PLANS))
    taught = logits(TEACHER, TEXT).argmax(-1)
    for ranked in found:
        given = logits(make(ranked.plan), TEXT)
        wanted = [batch.targets for batch in TEXT]
        right = sum(int((g.argmax(-1) == w).sum()) for g, w in zip(given, wanted, strict=True))
        nll = -sum(float(g.log_softmax(-1).gather(-1, w[..., None]).sum()) for g, w in zip(given, wanted, strict=True))
        assert ranked.tokens == taught.numel()
        assert ranked.accuracy == right / taught.numel()
        assert ranked.agreement == float((given.argmax(-1) == taught).double().mean())
        assert ranked.loss == pytest.approx(nll / taught.numel(), rel=1e-12)
    assert found[0].plan == PLANS[0] and found[0].agreement == 1.0
    worth = [r.accuracy + r.agreement for r in found]
    assert worth == sorted(worth, reverse=True)


def test_rounds_read_all_text_with_few_and_little_with_many() -> None:
    for n, b, keep in ((1, 1, 1), (7, 1, 3), (100, 8, 3), (6, 5, 2), (130, 64, 3), (3, 64, 5)):
        rounds = rounds_of(n, b, keep)
        assert rounds[0][0] == n and sum(size for _, size in rounds) == b and all(size > 0 for _, size in rounds)
        assert all(
            later >= min(keep, n) and later <= earlier for (earlier, _), (later, _) in itertools.pairwise(rounds)
        )
    assert rounds_of(100, 8, 3) == [(100, 1), (50, 1), (25, 2), (13, 4)]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_a_ranking_that_was_stopped_ends_as_it_would_have(tmp_path: Path, after: int) -> None:
    whole = rank(TEACHER, PLANS, make, TEXT, tmp_path / "whole", keep=2)
    made = 0

    def failing(limit: int) -> Callable[[Plan], Hybrid]:
        def made_one(plan: Plan) -> Hybrid:
            nonlocal made
            made += 1
            if made > limit:
                raise StoppedError
            return make(plan)

        return made_one

    with pytest.raises(StoppedError):
        rank(TEACHER, PLANS, failing(after), TEXT, tmp_path / "part", keep=2)
    made = 0
    again = rank(TEACHER, PLANS, failing(100), TEXT, tmp_path / "part", keep=2)
    assert again == whole
    assert made + after == sum(n for n, _ in rounds_of(len(PLANS), len(TEXT), 2))


def test_nothing_to_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 candidates"):
        rank(TEACHER, [], make, TEXT, tmp_path)


def test_the_likeliest_token_is_found_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.compress.rank.SLICE_LOGITS", 37 * 5)
    assert likeliest(TEACHER, TEXT[0]).tolist() == logits(TEACHER, TEXT[:1])[0].argmax(-1).tolist()
