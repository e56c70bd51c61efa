"""A paged cache: its rows step as ordinary caches do, natively and by the ordinary forward, whoever is beside them."""

import pytest
import torch

from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.paged import PAGE, PagedCache, Rows
from plait.model.step import step_rows
from plait.ops.dispatch import native_serves

SIZES: dict[str, object] = {
    "vocab_size": 97,
    "d_model": 40,
    "init_std": 0.3,
    "mamba2": {"n_heads": 4, "head_dim": 12, "d_state": 20, "n_groups": 2, "chunk": 16},
    "attention": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 24},
    "mlp": {"d_ff": 56},
}
# lengths within a page, across its edge, and at it
LENGTHS = [5, PAGE - 1, PAGE, 2 * PAGE + 9]
SLOTS = [3, 1, 4, 2]
TABLES = [[5], [7, 2], [1, 9], [12, 4, 3]]


def made(recipe: str = "fp32", pattern: str = "M-*M*") -> Hybrid:
    return build(ModelConfig.from_pattern(pattern, **SIZES), recipe=recipe)


def filled(model: Hybrid, piece: int = 50) -> tuple[PagedCache, list[Cache]]:
    """A paged cache of four sequences read in pieces, and ordinary caches of the same."""
    paged = PagedCache(model.config, 4, 12, device=model.device, dtype=model.recipe.compute)
    caches = []
    for i, (n, slot, table) in enumerate(zip(LENGTHS, SLOTS, TABLES, strict=True)):
        ids = torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(i))
        paged.clear(slot)
        caches.append(model.cache(1))
        for first in range(0, n, piece):
            rows = Rows(paged, [slot], [table], [first])
            got, _ = model.hidden(ids[:, first : first + piece], cache=rows)
            rows.store()
            wanted, _ = model.hidden(ids[:, first : first + piece], cache=caches[-1])
            assert torch.equal(got, wanted)
    return paged, caches


def stepped(model: Hybrid, paged: PagedCache, rows: list[int], ids: list[int], more: int = 1) -> torch.Tensor | None:
    lengths = [LENGTHS[row] + more for row in rows]
    places = [SLOTS[row] for row in rows], lengths, [TABLES[row] for row in rows]
    return step_rows(model, paged, ids, *places)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@torch.inference_mode()
def test_native_steps_of_rows_equal_those_of_ordinary_caches(recipe: str) -> None:
    if not native_serves("decode"):
        pytest.skip("the native kernels are not compiled")
    model = made(recipe)
    paged, caches = filled(model)
    for more in range(1, 4):
        got = stepped(model, paged, [0, 1, 2, 3], [7, 8, 9, 10], more)
        wanted = torch.cat([model(torch.tensor([[7 + i]]), cache=c).logits[:, 0] for i, c in enumerate(caches)])
        assert got is not None
        # the same sums in another order
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 if recipe == "fp32" else 0.07)


@torch.inference_mode()
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it() -> None:
    model = made("bf16")
    paged, caches = filled(model)
    together = stepped(model, paged, [0, 1, 2, 3], [7, 8, 9, 10])
    if together is None:
        pytest.skip("the native kernels are not compiled")
    for row, cache in enumerate(caches):
        for rows in ([row], [row, (row + 1) % 4], [(row + 2) % 4, (row + 3) % 4, row]):
            for i in rows:
                paged.take(SLOTS[i], TABLES[i], caches[i])
            got = stepped(model, paged, rows, [7 + i for i in rows])
            assert got is not None and torch.equal(got[rows.index(row)], together[row])
        assert cache.n_tokens == LENGTHS[row]


@pytest.mark.parametrize("pattern", ["M-*M*", "*-", "MM"])
@torch.inference_mode()
def test_ordinary_forwards_of_rows_equal_native_ones(pattern: str) -> None:
    model = made(pattern=pattern)
    paged, caches = filled(model)
    rows = Rows(paged, SLOTS, TABLES, LENGTHS)
    got = model(torch.tensor([[7], [8], [9], [10]]), cache=rows).logits[:, 0]
    rows.store()
    wanted = torch.cat([model(torch.tensor([[7 + i]]), cache=c).logits[:, 0] for i, c in enumerate(caches)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    # and the states went where they belong
    rows = Rows(paged, SLOTS, TABLES, [n + 1 for n in LENGTHS])
    got = model(torch.tensor([[1], [2], [3], [4]]), cache=rows).logits[:, 0]
    wanted = torch.cat([model(torch.tensor([[1 + i]]), cache=c).logits[:, 0] for i, c in enumerate(caches)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_sequence_saved_and_taken_elsewhere_goes_on_bit_by_bit() -> None:
    model = made("bf16")
    paged, caches = filled(model)
    saved = paged.save(SLOTS[3], TABLES[3], LENGTHS[3])
    for name, t in caches[3].tensors().items():
        assert torch.equal(saved.tensors()[name], t), name
    assert saved.n_bytes() == caches[3].n_bytes()
    wanted = stepped(model, paged, [3], [5])
    paged.take(SLOTS[0], [11, 6, 8], saved)
    got = step_rows(model, paged, [5], [SLOTS[0]], [LENGTHS[3] + 1], [[11, 6, 8]])
    if wanted is not None and got is not None:
        assert torch.equal(got, wanted)
    held = paged.held(SLOTS[0])
    paged.clear(SLOTS[0])
    assert all(not t.any() for state in paged.held(SLOTS[0]) for t in state)
    paged.hold(SLOTS[0], held)
    states = zip(paged.held(SLOTS[0]), held, strict=True)
    assert all(torch.equal(a, b) for mine, theirs in states for a, b in zip(mine, theirs, strict=True))
