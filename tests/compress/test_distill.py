"""What students read, and where what they learnt lies."""

from pathlib import Path

import pytest
import torch
from tests.train.test_loop import config
from tests.train.tiny import objective, tiny_config, tiny_model, write_documents

from plait.compress.distill import Data, Later, Rows, curve_of, distil, outcome_of, streams_of
from plait.compress.plan import shrunk
from plait.data.shards import Dataset
from plait.formats.checkpoint import load


def test_the_chosen_one_reads_what_follows_the_candidates_text(words: Dataset) -> None:
    goal = objective(words)
    later = Later(goal, 5)
    assert torch.equal(later.batches(2)[0].ids, goal.batches(7)[0].ids)
    assert not torch.equal(later.batches(2)[0].ids, goal.batches(2)[0].ids)
    assert later.identity() == {**goal.identity(), "first": 5}


def test_batches_are_those_of_the_rows_and_a_seed(words: Dataset, tmp_path: Path) -> None:
    data = Data(train=words, valid=write_documents(tmp_path / "valid", 20, seed=4))
    rows = Rows(seq_len=16, batch_size=4, accumulate=2)
    goal = data.objective(rows, seed=3, validation_batches=2)
    assert [tuple(batch.ids.shape) for batch in goal.batches(0)] == [(2, 16)] * 2
    assert len(goal.validation()) == 2
    other = data.objective(rows, seed=4, validation_batches=2)
    assert goal.identity() != other.identity()
    assert not torch.equal(goal.batches(0)[0].ids, other.batches(0)[0].ids)
    with pytest.raises(ValueError, match="accumulate=3 does not divide"):
        Rows(batch_size=4, accumulate=3)


def test_a_stage_leaves_model_and_outcome_and_does_not_train_twice(words: Dataset, tmp_path: Path) -> None:
    started: list[int] = []

    def start():  # noqa: ANN202
        started.append(1)
        return tiny_model(seed=1)

    def once() -> dict[str, object]:
        return distil(tmp_path, start, objective(words), config(steps=12), name="fresh", seed=0)

    found = once()
    assert once() == found == outcome_of(tmp_path) and started == [1]
    assert found["steps"] == 12 and len(curve_of(tmp_path)) == 12
    assert load(tmp_path / "model").config == tiny_config()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_each_layer_hands_on_what_the_next_one_is_used_to() -> None:
    plan = shrunk(tiny_config("M-*-M-"), (0, 3, 4))
    streams = streams_of(plan, 6, (1, 2), 0.5)
    # behind the first come layers 1 and 2, which went; behind the last, layer 5
    assert streams.pairs == ((1, 3), (2, 4), (3, 6)) and streams.channels == (1, 2)
