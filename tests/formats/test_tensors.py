"""Lazy tensors: stacks, rows, shapes and casts read as the eager ones would."""

import pytest
import torch
from torch import Tensor

from plait.formats import tensors
from plait.formats.tensors import LazyTensor


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 20)


def test_a_tensor_reads_as_it_is() -> None:
    x = torch.randn(3, 7)
    assert torch.equal(LazyTensor.of(x).read(), x)
    assert torch.equal(LazyTensor.of(x.t()).read(), x.t())


def test_an_empty_tensor_reads_empty() -> None:
    assert LazyTensor.of(torch.empty(0, 4)).read().shape == (0, 4)


def test_a_scalar_reads_as_a_scalar() -> None:
    assert LazyTensor.of(torch.tensor(2.5)).read().item() == 2.5


def test_stack_and_row_are_each_others_reverse() -> None:
    parts = [torch.randn(4, 5) for _ in range(3)]
    stack = LazyTensor.stack([LazyTensor.of(part) for part in parts])
    assert torch.equal(stack.read(), torch.stack(parts))
    for i, part in enumerate(parts):
        assert torch.equal(stack.row(i).read(), part)
    assert torch.equal(stack.row(1).row(3).read(), parts[1][3])


def test_a_row_may_cross_runs() -> None:
    parts = [torch.randn(2, 3) for _ in range(4)]
    wide = LazyTensor.stack([LazyTensor.of(part) for part in parts]).reshaped((2, 12))
    assert torch.equal(wide.row(1).read(), torch.cat(parts[2:]).flatten())


def test_stacking_promotes_mixed_dtypes() -> None:
    lazy = LazyTensor.stack([LazyTensor.of(torch.ones(2)), LazyTensor.of(torch.ones(2, dtype=torch.bfloat16))])
    assert lazy.dtype == torch.float32
    assert torch.equal(lazy.read(), torch.ones(2, 2))


def test_casting_rounds_when_read() -> None:
    x = torch.randn(9)
    lazy = LazyTensor.of(x).cast(torch.bfloat16)
    assert lazy.n_bytes == 18
    assert torch.equal(lazy.read(), x.bfloat16())


def test_copying_fills_a_tensor_of_another_dtype() -> None:
    x = torch.randn(4, 4)
    out = torch.empty(4, 4, dtype=torch.float64)
    LazyTensor.of(x).copy_to(out)
    assert torch.equal(out, x.double())


def test_blocks_are_small() -> None:
    sizes = [block.numel() for block in LazyTensor.of(torch.zeros(13)).blocks()]
    assert sizes == [5, 5, 3]


def test_every_block_is_dropped_after_use() -> None:
    class Watched:
        def __init__(self) -> None:
            self.open = 0

        def read(self, start: int, count: int) -> Tensor:
            self.open += 1
            assert self.open == 1
            return torch.zeros(count)

        def drop(self, start: int, count: int) -> None:
            self.open -= 1

    watched = Watched()
    LazyTensor(shape=(13,), dtype=torch.float32, runs=(tensors.Run(watched, 0, 13),)).read()
    assert watched.open == 0
