"""Attention against a float64 softmax written out, with padding, documents and cached keys."""

import importlib

import pytest
import torch
from torch import Tensor

from plait.ops.attention import attention


def _exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """seen: (B, L, S) bool."""
    R = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(R, 2), v.repeat_interleave(R, 2)
    scores = torch.einsum("blhp,bshp->bhls", q.double(), k.double()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhls,bshp->blhp", weights, v.double())


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("L", "S"), [(1, 1), (17, 17), (1, 30), (5, 30)])
@pytest.mark.parametrize("masked", ["plain", "padding", "documents"])
def test_equals_the_softmax_written_out(L: int, S: int, H: int, K: int, masked: str) -> None:
    q, k, v = torch.randn(2, L, H, 8), torch.randn(2, S, K, 8), torch.randn(2, S, K, 8)
    position = torch.arange(S)
    seen = (position <= position[S - L :, None]).expand(2, L, S)
    key_mask = documents = None
    if masked == "padding":
        key_mask = torch.ones(2, S, dtype=torch.bool)
        key_mask[0, : (S - L) // 2] = False
        seen = seen & key_mask[:, None]
    if masked == "documents":
        documents = (torch.rand(2, S) < 0.2).long().cumsum(1)
        seen = seen & (documents[:, S - L :, None] == documents[:, None])
    got = attention(q, k, v, key_mask=key_mask, documents=documents)
    torch.testing.assert_close(got.double(), _exact(q, k, v, seen), rtol=1e-5, atol=1e-5)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 33, 4, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    whole = attention(q, k, v)
    monkeypatch.setattr(importlib.import_module("plait.ops.attention"), "MASK_BLOCK", 8)
    torch.testing.assert_close(attention(q, k, v), whole)


def test_a_row_of_padding_gives_numbers() -> None:
    q = k = v = torch.randn(1, 4, 2, 8)
    out = attention(q, k, v, key_mask=torch.zeros(1, 4, dtype=torch.bool))
    assert bool(out.isfinite().all())


def test_heads_that_do_not_group_are_refused() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="H=4, K=3"):
        attention(q, k, k)
