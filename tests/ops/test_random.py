"""Counter-based random numbers against the published words of Philox, and their promise to depend on nothing else."""

import pytest
import torch

from plait.ops.random import philox, stream, uniform

# known answers of Random123: key, counter, words
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_words_are_the_published_ones(key: int, counter: tuple[int, int, int, int], words: tuple[int, ...]) -> None:
    assert philox(key, *counter) == words
    # as a signed number, the key has the same 64 bits
    signed = torch.tensor(key - 2**64 if key >= 2**63 else key)
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    assert tuple(int(w) for w in philox(signed, c0, c1, c2, c3)) == words


def test_element_i_is_word_i_mod_4_of_counter_i_over_4() -> None:
    u = uniform((3, 7), seed=12345).flatten()
    for i in (0, 1, 2, 3, 4, 20):
        word = philox(12345, i // 4, 0, 0, 0)[i % 4]
        assert u[i].item() == (word >> 8) * 2.0**-24


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 1000])
def test_a_prefix_does_not_depend_on_the_length(n: int) -> None:
    u = uniform(n, seed=7)
    assert u.shape == (n,) and u.dtype == torch.float32
    assert torch.equal(u, uniform(1001, seed=7)[:n])


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    n = 1 << 20
    u = uniform(n, seed=stream(0, "a", 0)).double()
    assert u.min() >= 0 and u.max() < 1
    # standard error of the mean is (12 n)^-1/2, of the share of a bin of sixteen (15 / 256 / n)^1/2
    assert abs(u.mean() - 0.5) < 4.5 * (12 * n) ** -0.5
    shares = torch.histc(u, 16, 0, 1) / n
    assert (shares - 1 / 16).abs().max() < 4.5 * (15 / 256 / n) ** 0.5
    for lag in (1, 2, 4, 256):
        r = torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]
        assert abs(r) < 4.5 * n**-0.5


def test_streams_differ_by_seed_name_and_step_and_in_nothing_else() -> None:
    keys = [stream(s, n, t) for s in (0, 1, 2**40) for n in ("a", "b", "a dy") for t in (0, 1, 2**33)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    # a fact to keep: other numbers here would change every run that is resumed
    assert stream(5, "a", 7) == 224674972185270675


def test_tensors_and_numbers_give_the_same_stream() -> None:
    key = stream(torch.tensor(2**40 + 3), "layers.1.in_proj w", torch.tensor(123))
    assert key.dtype == torch.int64 and key.item() == stream(2**40 + 3, "layers.1.in_proj w", 123)
    assert torch.equal(uniform(9, seed=key), uniform(9, seed=int(key)))


def test_a_compiled_step_draws_the_same_and_never_compiles_again() -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        nonlocal count
        count += 1
        return graph.forward

    def draw(seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return uniform((4, 5), seed=stream(seed, "x", step))

    compiled = torch.compile(draw, backend=backend, fullgraph=True)
    for step in range(4):
        assert torch.equal(compiled(torch.tensor(3), torch.tensor(step)), uniform((4, 5), seed=stream(3, "x", step)))
    assert count == 1
