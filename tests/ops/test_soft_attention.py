"""Bounded attention against a float64 softmax written out; gradients; memory; decoding."""

import importlib

import pytest
import torch
from torch import Tensor

from plait.ops.attention import attention
from plait.ops.soft_attention import soft_attention, soft_decode

SOFT = [(None, None), (0.9, None), (None, (1.1, -0.1)), (2.0, (1.03, -0.03))]
soft = importlib.import_module("plait.ops.soft_attention")


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float | None, clip: tuple[float, float] | None) -> Tensor:
    """seen: (B, L, S) bool; one row at a time."""
    out, R = torch.zeros(q.shape, dtype=torch.float64), q.shape[2] // k.shape[2]
    for b, t, h in [(b, t, h) for b in range(q.shape[0]) for t in range(q.shape[1]) for h in range(q.shape[2])]:
        keys, values = k[b, seen[b, t], h // R].double(), v[b, seen[b, t], h // R].double()
        z = keys @ q[b, t, h].double() / q.shape[-1] ** 0.5
        z = z if cap is None else cap * torch.tanh(z / cap)
        p = torch.exp(z - z.max())
        p = p / p.sum()
        if clip is not None:
            p = (clip[1] + p * (clip[0] - clip[1])).clamp(0, 1)
        out[b, t, h] = p @ values
    return out


def inputs(B: int, L: int, S: int, H: int, K: int, P: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * torch.randn(B, L, H, P), torch.randn(B, S, K, P), torch.randn(B, S, K, P)


@pytest.mark.parametrize(("cap", "clip"), SOFT)
@pytest.mark.parametrize(("L", "S", "H", "K"), [(1, 1, 2, 2), (11, 11, 4, 2), (1, 19, 3, 1), (5, 19, 4, 4)])
@pytest.mark.parametrize("masked", ["plain", "padding", "documents"])
@pytest.mark.parametrize("at_once", [1 << 22, 60])
def test_equals_the_softmax_written_out(
    L: int, S: int, H: int, K: int, masked: str, cap: float | None, clip: tuple[float, float] | None,
    at_once: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(soft, "LOGITS", at_once)
    q, k, v = inputs(2, L, S, H, K)
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
    got = soft_attention(q, k, v, cap=cap, clip=clip, key_mask=key_mask, documents=documents)
    torch.testing.assert_close(got.double(), exact(q, k, v, seen, cap, clip), rtol=1e-5, atol=1e-5)


def test_without_bounds_it_is_attention() -> None:
    q, k, v = inputs(2, 9, 14, 4, 2)
    torch.testing.assert_close(soft_attention(q, k, v), attention(q, k, v))
    half = [t.bfloat16() for t in (q, k, v)]
    assert soft_attention(*half, cap=5.0).dtype == torch.bfloat16


@pytest.mark.parametrize(("cap", "clip"), SOFT[1:])
@pytest.mark.parametrize("at_once", [1 << 22, 20])
def test_gradients_equal_finite_differences(
    cap: float | None, clip: tuple[float, float] | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft, "LOGITS", at_once)
    tensors = [t.double().requires_grad_() for t in inputs(1, 5, 5, 2, 1, 3)]
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: soft_attention(q, k, v, cap=cap, clip=clip, documents=documents), tensors
    )


def test_backward_keeps_one_block_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft, "LOGITS", 8 * 64 * 2)
    kept = []
    q, k, v = (t.requires_grad_() for t in inputs(1, 64, 64, 2, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        soft_attention(q, k, v, cap=3.0)
    # not even one number per logit is kept
    assert sum(kept) < 64 * 64 * 2


@pytest.mark.parametrize(("cap", "clip"), SOFT)
def test_a_row_of_padding_gives_numbers(cap: float | None, clip: tuple[float, float] | None) -> None:
    q, k, v = inputs(1, 4, 4, 2, 2)
    assert soft_attention(q, k, v, cap=cap, clip=clip, key_mask=torch.zeros(1, 4, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(("cap", "clip"), SOFT)
def test_decoding_sees_each_sequence_up_to_its_length(cap: float | None, clip: tuple[float, float] | None) -> None:
    q, k, v = inputs(3, 1, 13, 4, 2)
    lengths = torch.tensor([1, 13, 6])
    seen = (torch.arange(13) < lengths[:, None])[:, None]
    for b, n in enumerate(lengths.tolist()):
        k[b, n:] = v[b, n:] = float("nan")
    got = soft_decode(q, k.transpose(1, 2), v.transpose(1, 2), lengths, cap=cap, clip=clip)
    torch.testing.assert_close(got.double(), exact(q, k, v, seen, cap, clip), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_group_are_refused() -> None:
    q, k, v = inputs(1, 2, 2, 4, 3)
    with pytest.raises(ValueError, match="H=4, K=3"):
        soft_attention(q, k, v, cap=1.0)
