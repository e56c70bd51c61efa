"""The layers on one token, as a decode step runs them, at the sizes of a model.

Each is measured as a model of many equal layers with next to no vocabulary, through the public interface: so many that
their weights and states do not stay in the processor's cache, as they never do in a real step. Figures are per layer.
Linear layers are a feed-forward layer's two. The steps of convolution and state, and attention over a long cache, are
layers on a stream so narrow that their projections weigh little; what those weigh is counted in the bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from plait.cli.benches.case import Case
from plait.cli.benches.shapes import cache_bytes, weight_bytes
from plait.compress.stopwatch import filled
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.layer import LayerSpec
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.ops.dispatch import use

RECIPE_NAMES = ("bf16", "int8", "int4")
NARROW = 64
# more than processors hold in their caches
ENOUGH_BYTES = 1 << 28
MOST_LAYERS = 64


def single(config: ModelConfig, depth: int) -> Iterator[Case]:
    """Cases of one model; attention sees `depth` keys."""
    by_kind = {type(spec): spec for spec in config.layers}
    if MLP in by_kind:
        for recipe in RECIPE_NAMES:
            yield _layers(f"feed-forward, one token, {recipe}", by_kind[MLP], config.d_model, recipe)
    if Mamba2 in by_kind:
        for recipe in RECIPE_NAMES:
            yield _layers(f"Mamba-2, one token, {recipe}", by_kind[Mamba2], config.d_model, recipe)
        yield _layers("convolution and state, one token", by_kind[Mamba2], NARROW, "bf16")
    if Attention in by_kind:
        yield _layers(f"attention, one token, {depth} keys", by_kind[Attention], NARROW, "bf16", depth)


def _layers(name: str, spec: LayerSpec, d_model: int, recipe: str, depth: int = 0) -> Case:
    one = ModelConfig(name=name, vocab_size=NARROW, d_model=d_model, layers=(spec,))
    each = 2 * one.cost().params + cache_bytes(one, depth)
    count = max(1, min(MOST_LAYERS, ENOUGH_BYTES // each))
    model = _model(replace(one, layers=(spec,) * count), recipe)
    cache = filled(model, depth)
    cache.reserve(depth + 4096)
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def fast() -> Tensor:
        with torch.inference_mode():
            return model(ids, cache=cache, n_logits=1).logits

    def slow() -> Tensor:
        with torch.inference_mode(), use("reference"):
            return model(ids, cache=cache, n_logits=1).logits

    def results() -> list[tuple[Tensor, Tensor]]:
        # few layers: rounding adds up from layer to layer
        few = _model(replace(one, layers=(spec,) * 2), recipe)
        caches = [filled(few, 70) for _ in range(2)]
        with torch.inference_mode():
            ours = few(ids, cache=caches[0], n_logits=1).logits
            with use("reference"):
                theirs = few(ids, cache=caches[1], n_logits=1).logits
        states = [list(found.tensors().values()) for found in caches]
        return [(ours, theirs), *zip(*states, strict=True)]

    n_bytes = weight_bytes(model) + cache_bytes(model.config, depth)
    return Case(
        name=name,
        fast=fast,
        slow=slow,
        backend="tape" if _is_taped(fast, cache) else "dispatched",
        against="reference",
        results=results,
        n_bytes=n_bytes / count,
        parts=count,
    )


def _model(config: ModelConfig, recipe: str) -> Hybrid:
    # as a loaded checkpoint is: matrices in what they are computed in
    model = build(config, recipe=recipe, seed=0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(model.recipe.compute)
    return model.eval()


def _is_taped(fast: Callable[[], Tensor], cache: object) -> bool:
    fast()
    return bool((getattr(cache, "tape", None) or (None, None))[1])
