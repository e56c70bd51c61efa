"""Several tokens of a sequence by one native call: the bits of single steps, and a state after each of them."""

import pytest
import torch

from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.paged import PagedCache
from plait.model.step import step_rows
from plait.ops.dispatch import native_serves

pytestmark = pytest.mark.skipif(not native_serves("decode"), reason="the native kernels are not compiled here")
N_READ = 70  # more than a page


def single(model: Hybrid, cache: PagedCache, slot: int, pages: list[int], ids: list[int]) -> list[torch.Tensor]:
    """Logits after each id, one by one from an empty slot."""
    cache.clear(slot)
    out = []
    for n, token_id in enumerate(ids):
        logits = step_rows(model, cache, [token_id], [slot], [n + 1], [pages])
        assert logits is not None
        out.append(logits[0])
    return out


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("n_drafts", [1, 3, 7])
@torch.inference_mode()
def test_a_chain_of_tokens_equals_single_steps_bit_by_bit(recipe: str, n_drafts: int) -> None:
    sizes = {
        "mamba2": {"n_heads": 6, "head_dim": 24, "d_state": 20, "n_groups": 2},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope": {"base": 10_000.0}},
        "mlp": {"d_ff": 72},
    }
    model = build(ModelConfig.from_pattern("M-M*-M", vocab_size=200, d_model=48, init_std=0.2, **sizes), recipe)
    cache = PagedCache(model.config, 3 + n_drafts, 6, device=model.device, dtype=model.recipe.compute)
    ids = torch.randint(0, 200, (N_READ + 1 + n_drafts,)).tolist()
    expected = single(model, cache, 1, [1, 2], ids)
    single(model, cache, 2, [3, 4], ids[:N_READ])
    stranger = single(model, cache, 3, [5, 6], ids[:9])
    single(model, cache, 3, [5, 6], ids[:8])
    # the first goes where it came from, each of the others into a slot of its own; a stranger stands beside them
    spare = list(range(4, 4 + n_drafts))
    logits = step_rows(
        model,
        cache,
        [*ids[N_READ:], ids[8]],
        [2, 2, *spare[:-1], 3],
        [*range(N_READ + 1, N_READ + 2 + n_drafts), 9],
        [*[[3, 4]] * (1 + n_drafts), [5, 6]],
        [2, *spare, 3],
    )
    assert logits is not None
    assert torch.equal(logits[:-1], torch.stack(expected[N_READ:]))
    assert torch.equal(logits[-1], stranger[8])
    # from the state after any of them it goes on as if the later ones had never been
    for n, slot in reversed(list(enumerate([2, *spare]))):
        on = step_rows(model, cache, [7], [slot], [N_READ + 2 + n], [[3, 4]])
        assert on is not None
        assert torch.equal(on[0], single(model, cache, 1, [1, 2], [*ids[: N_READ + 1 + n], 7])[-1])
