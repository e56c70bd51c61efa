"""Tensors that are made as they are read."""

import pytest
import torch
from torch import Tensor

from plait.formats import computed as module
from plait.formats import tensors
from plait.formats.computed import computed


def test_a_large_tensor_is_made_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64)
    whole, asked = torch.arange(600.0).view(30, 20), []

    def make(first: int, n: int) -> Tensor:
        asked.append((first, n))
        return whole[first : first + n]

    assert torch.equal(computed((30, 20), torch.float32, make).read(), whole)
    assert asked == [(0, 30)], "38 pieces are read"
    assert torch.equal(computed((30, 20), torch.float32, make, 12).rows(10, 15).read(), whole[10:25])
    assert asked[1:] == [(0, 12), (12, 12), (24, 6)]
    twice = computed((30, 20), torch.float32, make)
    assert torch.equal(twice.rows(3, 4).read(), whole[3:7]) and torch.equal(twice.read(), whole)
    assert len(asked) == 5 and not module._made
