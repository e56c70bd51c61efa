"""Attention without masks for padded and packed rows: its arithmetic, on a varlen_attn written out for the CPU."""

import importlib
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torchs

from plait.kernels.eager import varlen
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.ops.attention import attention
from plait.ops.dispatch import BackendError, use

calls: list[tuple[list[int], list[int]]] = []


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's documentation says of it: sequences back to back, (-1, 0) causal and aligned with the last key."""
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    q_cuts, k_cuts = cu_seq_q.tolist(), cu_seq_k.tolist()
    calls.append((q_cuts, k_cuts))
    assert q_cuts[0] == k_cuts[0] == 0 and q_cuts[-1] == len(query) and k_cuts[-1] == len(key)
    assert len(query) and all(t.stride(2) == 1 for t in (query, key, value))
    parts = []
    for i in range(len(q_cuts) - 1):
        L, S = q_cuts[i + 1] - q_cuts[i], k_cuts[i + 1] - k_cuts[i]
        assert 0 <= L <= max_q and L <= S <= max_k
        if L:
            ends = slice(q_cuts[i], q_cuts[i + 1]), slice(k_cuts[i], k_cuts[i + 1])
            a, b, c = (
                t[end].transpose(0, 1) for t, end in zip((query, key, value), (ends[0], *ends[1:] * 2), strict=True)
            )
            seen = torch.ones(L, S, dtype=torch.bool).tril(S - L)
            parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes float32 tensors on the CPU for what a GPU would be given."""
    calls.clear()
    monkeypatch.setattr(torchs, "varlen_attn", varlen_attn)
    monkeypatch.setattr(importlib.import_module("plait.ops.attention"), "_trusts", lambda q, k, v: True)


def results(backend: str, t: dict[str, Tensor], real: Tensor, **masks: Tensor | None) -> list[Tensor]:
    """The result at real tokens, and the gradients of all three inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    with use(backend):
        out = attention(**leaves, **masks)[real]  # type: ignore[arg-type]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), list(leaves.values()))]


def same(t: dict[str, Tensor], real: Tensor, **masks: Tensor | None) -> None:
    for a, b in zip(results("varlen", t, real, **masks), results("reference", t, real, **masks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def inputs(B: int, L: int, S: int, H: int = 4, K: int = 2, P: int = 8) -> dict[str, Tensor]:
    return {"q": torch.randn(B, L, H, P), "k": torch.randn(B, S, K, P), "v": torch.randn(B, S, K, P)}


def test_where_documents_and_rows_begin() -> None:
    documents = torch.tensor([[1, 1, 2, 2, 2], [2, 2, 2, 2, 2], [0, 1, 2, 3, 3]])
    # 0 2 | 5 | 10 11 12 13, and the end until there are eight numbers
    assert varlen.document_cuts(documents).tolist() == [0, 2, 5, 10, 11, 12, 13, 15]
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    assert varlen.document_cuts(documents, mask).tolist() == [0, 1, 3, 4, 6, 6, 6, 6]
    assert varlen.row_cuts(mask).tolist() == [0, 3, 3, 6]
    assert varlen.document_cuts(documents[:1, :1]).tolist() == [0, 1]
    assert varlen.document_cuts(documents, mask & False).tolist() == [0]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (3, 1)])
def test_packed_documents_with_every_gradient(H: int, K: int) -> None:
    documents = (torch.rand(2, 23) < 0.3).long().cumsum(1)
    everything = torch.ones(2, 23, dtype=torch.bool)
    same(inputs(2, 23, 23, H, K), everything, documents=documents)
    # the last document of a row and the first of the next may have the same index
    same(inputs(2, 23, 23, H, K), everything, documents=torch.zeros(2, 23, dtype=torch.int64))
    assert calls[-1][0] == [0, 23, 46, 46]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("L", "S"), [(19, 19), (7, 19), (2, 19)])
def test_padding_before_and_after_with_every_gradient(L: int, S: int) -> None:
    mask = torch.ones(4, S, dtype=torch.bool)
    mask[0, : S - 3] = False  # most of the row, and with few queries all of its past
    mask[1, -2:] = False
    mask[2, :] = False
    mask[3, 4:6] = False  # padded after its first piece
    same(inputs(4, L, S), mask[:, S - L :], key_mask=mask)
    assert calls[-1][1] == varlen.row_cuts(mask).tolist() != calls[-1][0] or L == S


@pytest.mark.usefixtures("fake")
def test_documents_with_padding_and_keys_of_a_cache() -> None:
    mask = torch.arange(17) >= torch.tensor([[0], [5], [9]])
    documents = (torch.rand(3, 17) < 0.3).long().cumsum(1)
    same(inputs(3, 17, 17), mask, key_mask=mask, documents=documents)
    t = inputs(3, 5, 17)
    # as a cache gives them: heads before tokens in memory, and room to spare
    for name in ("k", "v"):
        room = torch.full((3, 2, 40, 8), torch.nan)
        room[:, :, :17] = t[name].transpose(1, 2)
        t[name] = room[:, :, :17].transpose(1, 2)
    same(t, mask[:, -5:], key_mask=mask)


@pytest.mark.usefixtures("fake")
def test_nothing_but_padding_gives_zeros() -> None:
    with use("varlen"):
        out = attention(**inputs(2, 3, 5), key_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert out.shape == (2, 3, 4, 8) and not out.any()


@pytest.mark.usefixtures("fake")
def test_random_shapes_equal_the_reference(n_shapes: int) -> None:
    draw = torch.Generator().manual_seed(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for _ in range(n_shapes):
        B, K, R, P, past, L = pick(1, 3), pick(1, 3), pick(1, 3), pick(1, 20), pick(0, 20), pick(2, 20)
        packed = bool(pick(0, 1))
        S = L if packed else past + L
        begin = torch.randint(0, S + 1, (B, 1), generator=draw)
        mask = torch.arange(S) >= begin if pick(0, 2) or not packed else None
        documents = (torch.rand(B, S, generator=draw) < 0.3).long().cumsum(1) if packed else None
        real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask[:, S - L :]
        same(inputs(B, L, S, K * R, K, P), real, key_mask=mask, documents=documents)


def test_an_older_pytorch_is_given_is_causal_and_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
              is_causal: bool = False) -> Tensor:  # fmt: skip
        assert is_causal and query.shape[1] == key.shape[1]
        return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))

    monkeypatch.setattr(torchs, "varlen_attn", older)
    assert varlen.trial(torch.device("cpu"), 37, dtype=torch.float32) < 1e-5


def aligned_with_the_first_key(q: Tensor, k: Tensor, v: Tensor, *rest: object, **how: object) -> Tensor:
    # shifted by one key: what a wrong alignment does to the last query
    return varlen_attn(q, k, v.roll(1, 0), *rest, **how)  # type: ignore[arg-type]


def without_a_gradient(q: Tensor, k: Tensor, v: Tensor, *rest: object, **how: object) -> Tensor:
    return varlen_attn(q.detach(), k, v, *rest, **how) + 0 * q  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("L", [37, 70])
def test_the_trial_on_a_gpu_passes_what_is_right_and_sees_what_is_wrong(
    L: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert varlen.trial(torch.device("cpu"), L, dtype=torch.float32) < 1e-5
    assert varlen.trial(torch.device("cpu"), L) < 0.02
    for wrong in (aligned_with_the_first_key, without_a_gradient):
        monkeypatch.setattr(torchs, "varlen_attn", wrong)
        monkeypatch.setattr(varlen, "_parameters", lambda: {"window_size", "enable_gqa"})
        assert varlen.trial(torch.device("cpu"), L) > 0.02


def test_a_gpu_on_which_it_fails_or_errs_takes_masks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken(device: torch.device, L: int) -> float:
        raise RuntimeError("no kernel image")

    tries: list[tuple[Callable[..., float], bool]] = [
        (broken, False),
        (lambda d, L: 0.3, False),
        (lambda d, L: 1e-3, True),
    ]
    for index, (trial, expected) in enumerate(tries):
        monkeypatch.setattr(varlen, "trial", trial)
        with caplog.at_level(logging.WARNING):
            assert varlen._tried(1000 + index) is expected
        assert (("takes masks" in caplog.text) is not expected) or expected
    varlen._tried.cache_clear()


def test_the_cpu_and_float32_never_come_here() -> None:
    t, documents = inputs(1, 5, 5), torch.zeros(1, 5, dtype=torch.int64)
    with use("varlen"), pytest.raises(BackendError):
        attention(**t, documents=documents)
    assert not varlen.fits(*t.values())
    half = {name: x.bfloat16() for name, x in t.items()}
    assert varlen.fits(*half.values()) and not varlen.fits(*(x[..., :7] for x in half.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", varlen.DTYPES)
def test_the_gpus_own_function_equals_masks(dtype: torch.dtype) -> None:
    assert varlen.trusted(0)
    for L in (2, 37, 70):
        assert varlen.trial(torch.device("cuda"), L, dtype=dtype) < 0.02


@pytest.mark.gpu
def test_packed_rows_of_a_model_equal_the_documents_alone_on_the_gpu() -> None:
    config = ModelConfig.from_pattern("*-M", vocab_size=64, d_model=64,
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}, mlp={"d_ff": 64},
        mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16})  # fmt: skip
    model = build(config, recipe="bf16", device="cuda")
    ids = torch.randint(0, 64, (1, 50), device="cuda")
    starts = torch.zeros(1, 50, dtype=torch.bool, device="cuda")
    starts[0, [0, 13, 40]] = True
    with torch.no_grad():
        packed = model(ids, starts=starts).logits.float()
        alone = torch.cat([model(part).logits.float() for part in ids.split([13, 27, 10], 1)], 1)
    assert (packed - alone).norm() < 0.02 * alone.norm()
