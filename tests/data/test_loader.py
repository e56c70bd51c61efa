import random
import threading
import time

import numpy as np
import pytest
import torch

from plait.data.blend import Blend, Phase
from plait.data.loader import Loader
from plait.data.packing import IGNORED
from plait.data.shards import Dataset
from plait.data.writer import ShardWriter

BLEND = Blend(phases=(Phase(0.6, {"a": 0.7, "b": 0.3}), Phase(1.0, {"a": 0.2, "b": 0.8})))


def dataset_of(folder, count, seed, first_id):
    rng = random.Random(seed)
    with ShardWriter(folder, 60_000, eos_id=0) as writer:
        for _ in range(count):
            writer.add([first_id + rng.randrange(100) for _ in range(rng.randrange(1, 60))])
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {"a": dataset_of(folder / "a", 50, 1, 1000), "b": dataset_of(folder / "b", 20, 2, 2000)}


def loader(datasets, **how):
    return Loader(datasets, BLEND, **({"batch_size": 8, "seq_len": 16, "seed": 3, "steps": 40} | how))


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "targets", "starts"))


def test_batches_have_the_promised_shapes(datasets):
    batch = loader(datasets).batch(0)
    assert [t.shape for t in (batch.ids, batch.targets, batch.starts)] == [(8, 16)] * 3
    assert [t.dtype for t in (batch.ids, batch.targets, batch.starts)] == [torch.int64, torch.int64, torch.bool]
    assert batch.starts[:, 0].all()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_have_the_batch_of_one(datasets, world):
    whole = loader(datasets)
    ranks = [loader(datasets, rank=rank, world=world) for rank in range(world)]
    for step in (0, 1, 23, 39):
        parts = [rank.batch(step) for rank in ranks]
        for name in ("ids", "targets", "starts"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole.batch(step), name))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_iterating_gives_the_same_batches_for_any_number_of_workers(datasets, workers):
    got = list(loader(datasets).iterate(5, 30, workers=workers))
    fresh = loader(datasets)
    assert len(got) == 25
    assert all(same(batch, fresh.batch(5 + i)) for i, batch in enumerate(got))


@pytest.mark.parametrize("step", [1, 17, 24, 39])
def test_resuming_at_any_step_equals_going_on(datasets, step):
    uninterrupted = list(loader(datasets).iterate(0, 40))[step:]
    resumed = list(loader(datasets).iterate(step, 40, workers=2))
    assert len(resumed) == len(uninterrupted) > 0
    assert all(same(a, b) for a, b in zip(resumed, uninterrupted, strict=True))


def test_walking_away_from_an_endless_iteration_is_clean(datasets):
    batches = loader(datasets).iterate()
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("plait-loader")]


def test_phases_are_respected(datasets):
    one = loader(datasets, steps=200)
    for first, last, weight in ((0, 120, 0.7), (120, 200, 0.2)):
        rows = torch.cat([one.batch(step).ids for step in range(first, last)])
        # a row holds ids of one source only, besides end marks
        from_a = (rows.amax(dim=1) < 2000).float().mean().item()
        assert abs(from_a - weight) < 0.01


def test_one_epoch_without_repeating_counts_every_token_once(datasets):
    one = Loader({"a": datasets["a"]}, batch_size=8, seq_len=16, seed=0, repeat=False)
    batches = list(one.iterate(0, one.n_steps_per_epoch()))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    # each document's first token is predicted by nothing
    assert (targets != IGNORED).sum() == datasets["a"].n_tokens - datasets["a"].n_documents
    assert (one.batch(one.n_steps_per_epoch()).targets == IGNORED).all()
    repeating = Loader({"a": datasets["a"]}, batch_size=8, seq_len=16, seed=0)
    assert (repeating.batch(one.n_steps_per_epoch()).targets != IGNORED).any()


def test_without_a_blend_sources_come_in_proportion(datasets):
    one = Loader(datasets, batch_size=8, seq_len=16, seed=0)
    counts = one.plan.counts(1000)
    share = datasets["a"].n_tokens / sum(dataset.n_tokens for dataset in datasets.values())
    assert abs(counts["a"] / 1000 - share) < 0.01


def test_batches_split_and_move(datasets):
    batch = loader(datasets).batch(0)
    assert torch.equal(torch.cat([part.ids for part in batch.split(4)]), batch.ids)
    assert batch.to("meta").ids.device.type == "meta"
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        batch.split(3)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"batch_size": 6, "world": 4}, "batch_size = 6 must be a multiple"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"rank": 2, "world": 2}, "rank = 2 is not below"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"steps": None}, "give the number of steps"),
    ],
)
def test_numbers_that_do_not_fit_are_named(datasets, how, named):
    with pytest.raises(ValueError, match=named):
        loader(datasets, **how)


def test_an_empty_corpus_is_named_with_its_folder(tmp_path):
    ShardWriter(tmp_path / "void", 10).close()
    with pytest.raises(ValueError, match="void holds no tokens; write it anew from files that hold text"):
        Loader({"void": Dataset.open(tmp_path / "void")}, batch_size=1, seq_len=4, seed=0)
    with pytest.raises(ValueError, match="no datasets"):
        Loader({}, batch_size=1, seq_len=4, seed=0)


def test_a_negative_step_is_refused(datasets):
    with pytest.raises(ValueError, match="step = -1"):
        loader(datasets).batch(-1)


def test_a_batch_of_a_large_dataset_takes_no_time(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60_000, 10_000_000, dtype=np.uint16)
    with ShardWriter(tmp_path / "large", 60_000, eos_id=0) as writer:
        for piece in np.split(tokens, np.cumsum(rng.integers(20, 900, 21_000))):
            if piece.size:
                writer.add(piece)
    one = Loader({"large": Dataset.open(tmp_path / "large")}, batch_size=4, seq_len=512, seed=0)
    one.batch(0)
    start = time.thread_time()
    for step in range(100):
        one.batch(step)
    assert (time.thread_time() - start) / 100 < 2e-3
