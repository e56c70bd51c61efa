"""Batches of unequal prompts, in chunks of any size, give what each prompt gives alone."""

from collections.abc import Callable

import pytest
import torch

from plait.engine.runner import groups, prefill
from plait.model.hybrid import Hybrid

LENGTHS = (1, 15, 16, 17, 33, 70)


@pytest.mark.parametrize("chunk", [1, 7, 16, 96, 97, 4096])
@pytest.mark.parametrize("pattern", ["M-M*-M", "*-*-", "MM", "ME*"])
def test_chunked_prefill_of_a_padded_batch_equals_whole_prompts_alone(
    tiny: Callable[..., Hybrid], pattern: str, chunk: int
) -> None:
    model = tiny(pattern, moe={"n_experts": 4, "n_chosen": 2, "d_ff": 16, "d_shared": 16})
    prompts = [torch.randint(0, 384, (n,)).tolist() for n in LENGTHS]
    with torch.inference_mode():
        cache = model.cache(len(prompts))
        logits = prefill(model, prompts, cache, chunk)
        alone = torch.cat([model(torch.tensor([p]), n_logits=1).logits[:, 0] for p in prompts])
    # float32 sums in another order: the largest logits are near 10, so 1e-4 is about a hundred roundings
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == list(LENGTHS)


def test_no_call_sees_more_tokens_than_the_chunk(tiny: Callable[..., Hybrid], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    seen: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **how: (seen.append(ids.numel()), hidden(ids, **how))[1])
    with torch.inference_mode():
        prefill(model, [[1] * 100, [2] * 90, [3] * 33], model.cache(3), 60)
    assert max(seen) == 60
    assert sum(seen) == 300


def test_groups_keep_neighbours_in_length_together() -> None:
    assert groups([3, 9, 5], max_batch=8, slack=100) == [[1, 2, 0]]
    assert groups([1] * 7, max_batch=3, slack=100) == [[0, 1, 2], [3, 4, 5], [6]]
    # one long prompt does not drag the short ones to its length
    assert groups([10, 10_000, 10, 10], max_batch=8, slack=2048) == [[1], [0, 2, 3]]


def test_no_group_is_more_than_a_quarter_padding() -> None:
    lengths = [int(x) for x in torch.randint(1, 5000, (200,)) ** 2 // 5000 + 1]
    slack = 512
    result = groups(lengths, max_batch=16, slack=slack)
    assert sorted(i for members in result for i in members) == list(range(200))
    for members in result:
        padded = max(lengths[i] for i in members) * len(members)
        assert len(members) <= 16
        assert padded <= max(slack, 4 / 3 * sum(lengths[i] for i in members))
