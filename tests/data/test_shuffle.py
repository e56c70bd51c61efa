import numpy as np

from plait.data.shuffle import hashes, key_of, permutation, uniform


def test_the_sequence_is_splitmix64():
    # the first outputs for seed 1234567, as every implementation of splitmix64 prints them
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hashes(5, 1234567).tolist() == known


def test_permutations_hold_every_number_once_and_depend_on_the_key():
    for count in (0, 1, 2, 1000):
        assert sorted(permutation(count, 7).tolist()) == list(range(count))
    assert permutation(1000, 7).tolist() != permutation(1000, 8).tolist()


def test_keys_depend_on_every_part_and_their_order():
    parts = [("a", 1), (1, "a"), ("a", "1"), ("a1",), ("a", 2), ("a", 1, 0)]
    assert len({key_of(*part) for part in parts}) == len(parts)
    # a fixed value: orders must outlive versions of this code
    assert key_of("documents", 0, "wiki", 3) == 5691929846679904095


def test_uniform_numbers_fill_the_interval_evenly():
    counts, _ = np.histogram(uniform(100_000, 3), bins=20, range=(0, 1))
    # 5000 expected, standard deviation 69
    assert abs(counts - 5000).max() < 5 * 69
