import random

import numpy as np
import pytest

from plait.data.packing import IGNORED, Packing
from plait.data.shards import Dataset
from plait.data.writer import ShardWriter


def dataset_of(folder, lengths, shard_tokens=1 << 20):
    """Token ids tell the document and the place: document d holds 1000 d + 1, 1000 d + 2, ... and ends with 0."""
    with ShardWriter(folder, 1 << 20, eos_id=0, shard_tokens=shard_tokens) as writer:
        for number, length in enumerate(lengths):
            writer.add([1000 * number + 1 + i for i in range(length)])
    return Dataset.open(folder)


def sample(packing, number):
    row = [np.full(packing.seq_len, 7, kind) for kind in (np.int64, np.int64, np.bool_)]
    packing.fill(number, *row)
    return [column.tolist() for column in row]


def random_lengths(seed, count=40):
    rng = random.Random(seed)
    return [rng.choice([1, 2, 3, 7, 20, 90]) for _ in range(count)]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 63, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_is_an_input_exactly_once_in_each_epoch(tmp_path, seq_len, seed):
    lengths = random_lengths(seed)
    dataset = dataset_of(tmp_path / "set", lengths, shard_tokens=100)
    packing = Packing(dataset, seq_len, seed=seed)
    wanted = sorted(token for i in range(len(lengths)) for token in dataset.document(i).tolist())
    for epoch in (0, 1, 5):
        ids = [t for k in range(packing.n_samples) for t in sample(packing, epoch * packing.n_samples + k)[0]]
        # the last window is filled with end marks, which are not tokens of any document
        padding = packing.n_samples * seq_len - dataset.n_tokens
        assert sorted(ids) == sorted(wanted + [0] * padding)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 63, 5000])
def test_every_token_but_first_ones_is_a_target_exactly_once(tmp_path, seq_len):
    lengths = random_lengths(3)
    packing = Packing(dataset_of(tmp_path / "set", lengths), seq_len, seed=5)
    targets = [t for k in range(packing.n_samples) for t in sample(packing, k)[1]]
    # an end mark is predicted by the last word of its document; a first word is predicted by nothing
    wanted = [t for d, n in enumerate(lengths) for t in [*(1000 * d + 1 + i for i in range(1, n)), 0]]
    assert sorted(t for t in targets if t != IGNORED) == sorted(wanted)


def test_rows_say_where_documents_start_and_end(tmp_path):
    packing = Packing(dataset_of(tmp_path / "set", random_lengths(8)), 16, seed=1)
    rows = [sample(packing, k) for k in range(packing.n_samples)]
    # the window that was filled up has end marks in a row
    whole = [row for row in rows if (0, 0) not in zip(row[0], row[0][1:], strict=False)]
    assert len(whole) >= len(rows) - 1 > 20
    for ids, targets, starts in whole:
        for t in range(16):
            first = t == 0 or ids[t - 1] == 0
            assert starts[t] == first
            assert (targets[t] == IGNORED) == (ids[t] == 0)
            if t < 15 and ids[t] != 0:
                assert targets[t] == ids[t + 1]
            if ids[t] != 0 and targets[t] != 0:
                assert targets[t] == ids[t] + 1


def test_what_fills_the_last_window_counts_for_nothing(tmp_path):
    packing = Packing(dataset_of(tmp_path / "set", [2]), 8, seed=0)
    assert packing.n_samples == 1
    ids, targets, starts = sample(packing, 0)
    assert ids == [1, 2, 0, 0, 0, 0, 0, 0]
    assert targets == [2, 0, *[IGNORED] * 6]
    assert starts[:4] == [True, False, False, True]


@pytest.mark.parametrize(("length", "seq_len"), [(7, 8), (8, 8), (15, 8), (16, 8)])
def test_documents_that_end_at_a_window_edge_lose_no_target(tmp_path, length, seq_len):
    packing = Packing(dataset_of(tmp_path / "set", [length]), seq_len, seed=0)
    targets = [t for k in range(packing.n_samples) for t in sample(packing, k)[1]]
    assert sorted(t for t in targets if t != IGNORED) == [0, *range(2, length + 1)]


def test_orders_differ_by_epoch_seed_and_name_and_repeat_themselves(tmp_path):
    dataset = dataset_of(tmp_path / "set", random_lengths(2))

    def order(epoch, **how):
        packing = Packing(dataset, 8, **how)
        return tuple(tuple(sample(packing, epoch * packing.n_samples + k)[0]) for k in range(packing.n_samples))

    orders = [order(0, seed=1), order(1, seed=1), order(0, seed=2), order(0, seed=1, name="other")]
    assert len(set(orders)) == 4
    assert order(1, seed=1) == orders[1]


def test_windows_of_one_long_document_are_not_neighbours(tmp_path):
    packing = Packing(dataset_of(tmp_path / "set", [900]), 8, seed=0)
    firsts = [sample(packing, k)[0][0] for k in range(packing.n_samples)]
    assert sum(b == a + 8 for a, b in zip(firsts, firsts[1:], strict=False)) < 10


def test_an_empty_dataset_is_refused_by_folder(tmp_path):
    with pytest.raises(ValueError, match="empty holds no tokens; write it anew"):
        Packing(dataset_of(tmp_path / "empty", []), 8, seed=0)
    with pytest.raises(ValueError, match="seq_len = 0"):
        Packing(dataset_of(tmp_path / "set", [3]), 0, seed=0)
