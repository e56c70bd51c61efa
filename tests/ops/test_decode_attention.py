"""Decode attention in Triton against its reference: lengths, starts, pages, groups, slices, half formats."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import plait.kernels.triton.decode_attention as kernel
from plait.ops.decode_attention import decode_attention
from plait.ops.dispatch import use


def both(*args: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel's answer, and the reference's in float64."""
    with use("triton"):
        got = decode_attention(*args, **kwargs)
    with use("reference"):
        exact = decode_attention(*(t.double() if t.is_floating_point() else t for t in args), **kwargs)
    return got, exact


def cache(B: int, K: int, S: int, P: int, lengths: Tensor, starts: Tensor | None, **like: object) -> Tensor:
    """Random (B, K, S, P), no number where nothing may be read."""
    t = torch.randn(B, K, S, P, **like)  # type: ignore[call-overload]
    columns = torch.arange(S, device=t.device)
    used = columns < lengths[:, None]
    if starts is not None:
        used &= columns >= starts[:, None]
    return t.masked_fill(~used[:, None, :, None], float("nan"))


def paged(t: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The same keys in shuffled pages with one to spare, and their table."""
    B, K, S, P = t.shape
    per = -(-S // page)
    whole = F.pad(t, (0, 0, 0, per * page - S), value=float("nan"))
    pages = whole.view(B, K, per, page, P).transpose(1, 2).reshape(B * per, K, page, P)
    order = torch.randperm(B * per + 1, device=t.device)[: B * per]
    shuffled = torch.full((B * per + 1, K, page, P), float("nan"), dtype=t.dtype, device=t.device)
    shuffled[order] = pages
    return shuffled, order.view(B, per).int()


def test_the_reference_is_attention_over_the_valid_keys() -> None:
    q, k, v = torch.randn(2, 6, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    out = decode_attention(q, k, v, torch.tensor([11, 7]), starts=torch.tensor([0, 2]))
    for b, (first, end) in enumerate([(0, 11), (2, 7)]):
        part = (t[b, :, first:end].repeat_interleave(2, 0) for t in (k, v))
        exact = F.scaled_dot_product_attention(q[b, :, None], *part)[:, 0]
        torch.testing.assert_close(out[b], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("page", [None, 16, 24])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("H", "K", "P"), [(8, 2, 16), (5, 1, 10), (3, 3, 32), (20, 1, 16)])
def test_the_kernel_equals_the_reference(
    H: int, K: int, P: int, splits: int, page: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_splits", lambda *_: splits)
    lengths, starts = torch.tensor([0, 1, 64, 129, 200]), torch.tensor([0, 0, 63, 7, 0])
    q = torch.randn(5, H, P)
    k, v = (cache(5, K, 200, P, lengths, starts) for _ in range(2))
    table = None
    if page is not None:
        pages, table = paged(torch.cat([k, v], -1), page)
        k, v = pages[..., :P], pages[..., P:]
    got, exact = both(q, k, v, lengths, starts=starts, page_table=table)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    assert (got[0] == 0).all()


def test_random_shapes(n_shapes: int) -> None:
    for seed in range(n_shapes):
        random.seed(seed)
        torch.manual_seed(seed)
        B, K, S = random.randint(1, 3), random.choice([1, 2, 3]), random.randint(1, 260)
        H, P = K * random.choice([1, 2, 4, 7]), random.choice([4, 16, 24, 64])
        dtype = random.choice([torch.float32, torch.float16])
        lengths = torch.randint(0, S + 1, (B,), dtype=random.choice([torch.int32, torch.int64]))
        starts = None if random.random() < 0.5 else (lengths * torch.rand(B)).to(lengths.dtype)
        q = torch.randn(B, H, P).to(dtype)
        k, v = (cache(B, K, S, P, lengths, starts).to(dtype) for _ in range(2))
        got, exact = both(q, k, v, lengths, starts=starts)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), exact, rtol=4 * eps, atol=8 * eps, msg=f"seed {seed}")


def test_views_with_strides_are_read_where_they_lie() -> None:
    # a slice of a larger cache, heads and tokens swapped in memory, queries out of one projection
    store = torch.randn(4, 300, 2, 3, 16)
    k, v = (store[1:3, :200, i].transpose(1, 2) for i in range(2))
    q = torch.randn(2, 30, 16)[:, 5:11]
    got, exact = both(q, k, v, torch.tensor([200, 33]))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_slices_depend_on_the_room_and_not_on_the_lengths() -> None:
    assert kernel._splits(8, 65536, 64, 132) == 32  # 256 programs for 264 places
    assert kernel._splits(1, 65536, 64, 132) == 128
    assert kernel._splits(8, 255, 64, 132) == 1
    assert kernel._splits(840, 65536, 64, 132) == 3  # 9.5 waves instead of 3.2
    assert kernel._splits(5000, 65536, 64, 132) == 1


def test_sizes_that_do_not_fit_are_named() -> None:
    q, kv, lengths = torch.randn(2, 5, 8), torch.randn(2, 2, 4, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="2 key/value heads do not divide 5"):
        decode_attention(q, kv, kv, lengths)
    with pytest.raises(ValueError, match="a cache of 2 sequences"):
        decode_attention(torch.randn(3, 4, 8), kv, kv, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 16, 256])
def test_bfloat16_on_the_gpu(page: int | None) -> None:
    lengths = torch.tensor([1, 700, 4096], device="cuda")
    q = torch.randn(3, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(3, 8, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = None
    if page is not None:
        pages, table = paged(torch.cat([k, v], -1), page)
        k, v = pages[..., :128], pages[..., 128:]
    got, exact = both(q, k, v, lengths, page_table=table)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=4e-3)
