"""Layers: how much each of them matters, and which stay when a model is to have fewer.

    cosine    mean over tokens of 1 - cos(what enters the layer, what leaves it); from the same pass as the widths

What removing a layer does to the logits is measured by `compress/layers.py`: it takes passes of its own.

Source   Men et al. 2024, arXiv:2403.03853 (cosine); NVIDIA 2025, arXiv:2504.03624 section 3.2 (removal).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.compress.axis import Axis, Units
from plait.compress.taps import Taps
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid


def _watch(taps: Taps, where: str, model: Hybrid) -> None:
    def turning(name: str) -> Callable[[Tensor, Tensor], None]:
        def hook(x: Tensor, y: Tensor) -> None:
            wide = torch.promote_types(x.dtype, torch.float32)
            parts = zip(x.flatten(0, 1).split(256), y.flatten(0, 1).split(256), strict=True)
            taps.add(name, sum(((1 - F.cosine_similarity(a.to(wide), b.to(wide))).sum() for a, b in parts), 0.0))  # type: ignore[arg-type]

        return hook

    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}.cosine"
        taps.around(name, block, turning(name))


def _find(sums: Mapping[str, Tensor], where: str, model: Hybrid, tokens: int) -> Units:
    each = [sums[f"blocks.{i}.cosine"] / tokens for i in range(len(model.blocks))]
    return Units(importance={"cosine": torch.stack(each)})


def keep_layers(importance: Sequence[float], teacher: ModelConfig, counts: Mapping[str, int]) -> tuple[int, ...]:
    """The best layers of each kind, in their order.

    Args:
        importance: one number per layer, larger is more important.
        teacher: whose layers they are.
        counts: pattern letter -> how many of that kind stay; all of a kind that is not named.

    Raises: ValueError for more layers of a kind than there are, or importance of another number of layers.
    """
    if len(importance) != len(teacher.layers):
        raise ValueError(f"importance of {len(importance)} layers was given for a teacher of {len(teacher.layers)}")
    kept: list[int] = []
    for symbol in dict.fromkeys((*teacher.pattern, *counts)):
        of_kind = [i for i, letter in enumerate(teacher.pattern) if letter == symbol]
        n = counts.get(symbol, len(of_kind))
        if not 0 <= n <= len(of_kind):
            raise ValueError(f"counts[{symbol!r}]={n}: the teacher has {len(of_kind)} such layers; keep 0 to that many")
        # of equals, the earlier ones stay
        kept += sorted(of_kind, key=lambda i: (-importance[i], i))[:n]
    return tuple(sorted(kept))


AXIS = Axis(
    name="depth",
    title="layers",
    symbol="",
    fields=("layers",),
    measures=("cosine",),
    watch=_watch,
    find=_find,
    cut=None,
)
