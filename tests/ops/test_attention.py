"""Attention against a float64 softmax written out, with padding, documents and cached keys."""

import importlib

import pytest
import torch
from torch import Tensor

from plait.ops.attention import attention
from plait.ops.dispatch import use


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
    monkeypatch.setattr(importlib.import_module("plait.kernels.eager.attention"), "BLOCK", 8)
    torch.testing.assert_close(attention(q, k, v), whole)
    monkeypatch.setattr(importlib.import_module("plait.ops.attention"), "MASK_NUMBERS", 300)
    with use("reference"):
        torch.testing.assert_close(attention(q, k, v), whole)


def test_a_row_of_padding_gives_numbers() -> None:
    q = k = v = torch.randn(1, 4, 2, 8)
    out = attention(q, k, v, key_mask=torch.zeros(1, 4, dtype=torch.bool))
    assert bool(out.isfinite().all())


def test_heads_that_do_not_group_are_refused() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="H=4, K=3"):
        attention(q, k, k)


def test_a_piece_after_a_long_past_needs_no_mask_of_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    masked_fill = torch.Tensor.masked_fill_
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda t, *how: (made.append(t.numel()), masked_fill(t, *how))[1])
    monkeypatch.setattr(importlib.import_module("plait.ops.attention"), "_visible", None)
    q, k, v = torch.randn(2, 65, 4, 8), torch.randn(2, 5000, 2, 8), torch.randn(2, 5000, 2, 8)
    key_mask = torch.ones(2, 5000, dtype=torch.bool)
    key_mask[1, :4950] = False  # a row whose whole past is padding
    out = attention(q, k, v, key_mask=key_mask)
    seen = torch.ones(65, 5000, dtype=torch.bool).tril(5000 - 65) & key_mask[:, None]
    real = key_mask[:, -65:]
    torch.testing.assert_close(out[real].double(), _exact(q, k, v, seen)[real], rtol=1e-5, atol=1e-5)
    assert max(made) <= 2 * 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_pieces_with_and_without_padding_equal_the_softmax_written_out(
    dtype: torch.dtype, n_shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(n_shapes):
        B, K, R, P, past, L = pick(1, 3), pick(1, 3), pick(1, 4), pick(1, 40), pick(0, 90), pick(2, 70)
        monkeypatch.setattr(importlib.import_module("plait.kernels.eager.attention"), "BLOCK", pick(1, 80))
        S = past + L
        q = torch.randn(B, L, K * R, P, generator=draw).to(dtype)
        k, v = (torch.randn(B, S, K, P, generator=draw).to(dtype) for _ in range(2))
        seen = torch.ones(L, S, dtype=torch.bool).tril(past).expand(B, L, S)
        key_mask, real = None, torch.ones(B, L, dtype=torch.bool)
        if pick(0, 1):
            key_mask = torch.arange(S) >= torch.randint(0, S, (B, 1), generator=draw)
            seen, real = seen & key_mask[:, None], key_mask[:, past:]
        out = attention(q, k, v, key_mask=key_mask)
        # three roundings of numbers near 1: of the probabilities, of each part and of their sum
        limit = 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[real].double(), _exact(q, k, v, seen)[real], rtol=limit, atol=limit)
