"""The measurement of decoding: the random cache is one the model could have made."""

import pytest
import torch

from plait.cli.chapters import twins
from plait.cli.chapters.compare import ROUNDS, filled, step_seconds
from plait.cli.chapters.story import HYBRID, QUICK, TWIN
from plait.cli.info import sizes
from plait.model.hybrid import build


@pytest.mark.parametrize("name", [HYBRID, TWIN])
def test_a_filled_cache_has_the_bytes_of_a_read_text(name: str) -> None:
    config = twins.hybrid(QUICK, 350, 2)
    config = config if name == HYBRID else twins.twin(config)
    model = build(config, "bf16")
    cache = filled(model, 77, seed=0)
    real = model.cache(1)
    with torch.inference_mode():
        model(torch.zeros(1, 77, dtype=torch.int64), cache=real)
    assert cache.n_bytes() == real.n_bytes() == sizes(config, 77, 1).cache_bytes
    assert {k: t.shape for k, t in cache.tensors().items()} == {k: t.shape for k, t in real.tensors().items()}
    assert cache.n_tokens == 77 and cache.lengths.tolist() == [77]


def test_both_models_are_timed_in_turns_and_their_caches_grow() -> None:
    first = twins.hybrid(QUICK, 350, 2)
    models = {HYBRID: build(first, "fp32"), TWIN: build(twins.twin(first), "fp32")}
    caches = {(name, context): filled(model, context, seed=0) for name, model in models.items() for context in (9, 16)}
    seconds = step_seconds(models, caches, 2)
    assert all(len(found) == 2 * ROUNDS and min(found) > 0 for found in seconds.values())
    assert all(cache.n_tokens == context + 3 * ROUNDS for (_, context), cache in caches.items())
