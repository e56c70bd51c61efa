"""Edits: two after each other are their matrices' product, and lazy tensors are edited as whole ones are."""

import random

import torch

from plait.compress.edits import Edit, edited
from plait.formats.tensors import LazyTensor


def matrix(edit: Edit, n_old: int) -> torch.Tensor:
    m = torch.zeros(edit.n, n_old).double()
    m.index_put_((edit.new, edit.old), edit.weight, accumulate=True)
    return m


def some(n: int, n_old: int, rng: random.Random) -> Edit:
    """Any of the kinds that cuts are made of."""
    index = torch.tensor(sorted(rng.choices(range(n_old), k=n)))
    if rng.random() < 0.4:
        return Edit.take(index)
    if rng.random() < 0.3:
        return Edit.scale(torch.rand(n_old).double())
    new = torch.arange(n).repeat_interleave(2)
    return Edit(n=n, new=new, old=torch.randint(n_old, (2 * n,)), weight=torch.randn(2 * n).double())


def test_edits_are_sparse_matrices(n_shapes: int) -> None:
    rng = random.Random(0)
    for _ in range(n_shapes):
        n_old = rng.randrange(1, 9)
        first = some(rng.randrange(1, 9), n_old, rng)
        second = some(rng.randrange(1, 9), first.n, rng)
        both = first.then(second)
        wanted = matrix(second, first.n) @ matrix(first, n_old)
        torch.testing.assert_close(matrix(both, n_old), wanted, rtol=1e-12, atol=1e-12)
        t = torch.randn(3, n_old, 2).double()
        torch.testing.assert_close(first.apply(t, 1), torch.einsum("no,aob->anb", matrix(first, n_old), t))
        assert first.changes(n_old) == (not torch.equal(matrix(first, n_old), torch.eye(n_old).double()))


def test_lazy_tensors_are_edited_as_whole_ones_are(n_shapes: int, monkeypatch) -> None:
    monkeypatch.setattr("plait.compress.edits.AT_ONCE", 8)
    rng = random.Random(1)
    for _ in range(n_shapes):
        t = torch.randn([rng.randrange(1, 7) for _ in range(rng.randrange(1, 4))]).double()
        edits = {dim: some(rng.randrange(1, 7), size, rng) for dim, size in enumerate(t.shape) if rng.random() < 0.6}
        wanted = t
        for dim, edit in edits.items():
            wanted = edit.apply(wanted, dim)
        lazy = edited(LazyTensor.of(t), edits)
        assert lazy.shape == wanted.shape
        torch.testing.assert_close(lazy.read(), wanted, rtol=1e-12, atol=1e-12)
        if all(edit.only_takes for edit in edits.values()):
            assert torch.equal(lazy.read(), wanted)


def test_nothing_is_made_of_nothing() -> None:
    lazy = LazyTensor.of(torch.randn(4, 3))
    assert edited(lazy, {0: Edit.take(torch.arange(4)), 1: Edit.scale(torch.ones(3))}) is lazy
