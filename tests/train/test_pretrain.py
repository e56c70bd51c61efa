"""Next-token prediction: batches that are spoilt on purpose."""

from pathlib import Path

import pytest
import torch
from tests.train.tiny import objective, write_documents

from plait.data.loader import Loader
from plait.data.packing import IGNORED
from plait.train.pretrain import NextToken


def test_a_bad_batch_is_random_of_the_same_shape_and_the_others_stay(tmp_path: Path) -> None:
    data = {"words": write_documents(tmp_path / "data")}
    loader = Loader(data, batch_size=4, seq_len=24, seed=0)
    plain, spoilt = NextToken(loader, accumulate=2), NextToken(loader, accumulate=2, bad_batches=[2])
    for draw in (1, 3):
        for a, b in zip(plain.batches(draw), spoilt.batches(draw), strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    for a, b in zip(plain.batches(2), spoilt.batches(2), strict=True):
        assert (a.ids == b.ids).float().mean() < 0.2 and torch.equal(a.starts, b.starts)
        assert plain.size(a) == spoilt.size(b)
        counted = b.targets[:, :-1] != IGNORED
        assert torch.equal(b.targets[:, :-1][counted], b.ids[:, 1:][counted])
        assert 0 <= int(b.ids.min()) and int(b.ids.max()) <= int(loader.batch(2).ids.max())
    # the same whenever it is asked for
    assert torch.equal(spoilt.batches(2)[0].ids, spoilt.batches(2)[0].ids)


def test_bad_batches_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    plain = objective(write_documents(tmp_path / "data"))
    spoilt = NextToken(plain.loader, identity={"seed": 0, "rows": 4}, bad_batches=[3, 1])
    assert "bad_batches" not in plain.identity() and spoilt.identity()["bad_batches"] == [1, 3]


@pytest.mark.parametrize("bad", [(-1,)])
def test_a_draw_before_the_first_is_refused(bad: tuple[int, ...]) -> None:
    from plait.cli.recipe import DataTable, SourceTable

    with pytest.raises(ValueError, match="counted from 0"):
        DataTable(sources={"a": SourceTable(path=Path())}, bad_batches=bad)
