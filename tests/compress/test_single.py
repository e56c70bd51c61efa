"""The harm of a replacement is the divergence of the whole model with it, whatever is shared on the way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.compress.teachers import batches, checkpoint, logits, student, teacher

from plait.compress import single
from plait.compress.local import Lessons, teach
from plait.compress.plan import Plan
from plait.compress.prune import prune
from plait.compress.replace import KEEP, Library, Menu, Replacement, library
from plait.compress.score import Scores, score
from plait.compress.single import Harm, harm_of, score_library
from plait.formats.checkpoint import Checkpoint
from plait.model.hybrid import Hybrid

TEXT = batches(3)
MODEL = teacher("M-*")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Scores, Library, Path]:
    folder = tmp_path_factory.mktemp("single")
    source, scores = checkpoint(MODEL, folder), score(MODEL, TEXT)
    offered = library(MODEL.config, Menu(d_ff=(0.5,), n_heads=(0.67,)))
    teach(MODEL, source, scores, offered, lambda step: [TEXT[step % 3]], folder / "weights", Lessons(steps=3))
    return source, scores, offered, folder / "weights"


def realised(source: Checkpoint, scores: Scores, chosen: dict[int, Replacement], weights: Path) -> Hybrid:
    """The teacher with some layers replaced, by way of a plan and a checkpoint."""
    specs = {i: chosen[i].spec if i in chosen else spec for i, spec in enumerate(source.config.layers)}
    kept = tuple(i for i, spec in specs.items() if spec is not None)
    config = replace(source.config, layers=tuple(spec for spec in specs.values() if spec is not None))
    replaced = {i: r.file(weights) for i, r in chosen.items() if r.learns}
    return student(prune(source, Plan(kept=kept, config=config, replaced=replaced), scores))


def by_hand(model: Hybrid) -> Harm:
    p, q = (logits(m, TEXT).log_softmax(-1) for m in (MODEL, model))
    targets = torch.stack([batch.targets for batch in TEXT])[..., None]
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Harm(kl=kl, loss=float((p - q).gather(-1, targets).mean()))


def test_every_harm_is_that_of_the_model_with_the_replacement(made, tmp_path: Path) -> None:  # noqa: ANN001
    source, scores, offered, weights = made
    table = score_library(MODEL, offered, weights, TEXT, tmp_path)
    assert sorted(table) == sorted((r.layer, r.name) for row in offered for r in row)
    for row in offered:
        assert table[row[0].layer, KEEP] == Harm(kl=0, loss=0)
        for r in row[1:]:
            model = realised(source, scores, {r.layer: r}, weights)
            wanted, found = by_hand(model), table[r.layer, r.name]
            # weights are stored in the teacher's float64, so only the order of sums differs
            assert (found.kl, found.loss) == pytest.approx((wanted.kl, wanted.loss), rel=1e-9, abs=1e-12)
            whole = harm_of(MODEL, model, TEXT)
            assert (whole.kl, whole.loss) == pytest.approx((wanted.kl, wanted.loss), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_scoring_that_was_stopped_ends_the_same(
    made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,  # noqa: ANN001
) -> None:
    _, _, offered, weights = made
    whole = score_library(MODEL, offered, weights, TEXT, tmp_path / "whole")
    read, real = 0, single.learnt

    def failing(*args):  # noqa: ANN002, ANN202
        nonlocal read
        read += 1
        if read > after:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(single, "learnt", failing)
        with pytest.raises(KeyboardInterrupt):
            score_library(MODEL, offered, weights, TEXT, tmp_path / "part")
    assert score_library(MODEL, offered, weights, TEXT, tmp_path / "part") == whole
