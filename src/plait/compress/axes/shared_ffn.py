"""Neurons of the expert that every token passes, in layers of experts: as those of a feed-forward layer."""

from collections.abc import Mapping

from torch import Tensor

from plait.compress.axes import ffn
from plait.compress.axis import Axis, Edits, How, Units
from plait.compress.taps import Taps
from plait.model.hybrid import Block
from plait.model.layers.moe import MoE, MoEMixer


def _watch(taps: Taps, where: str, block: Block) -> None:
    assert isinstance(block.mixer, MoEMixer)
    if block.mixer.shared is not None:
        ffn.watch(taps, f"{where}.shared", block.mixer.shared)


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    assert isinstance(block.mixer, MoEMixer)
    if block.mixer.shared is None:
        return Units(importance={})
    return ffn.find(sums, f"{where}.shared", block.mixer.shared, tokens)


def _cut(spec: MoE, wanted: MoE, units: Units, how: How) -> Edits:
    return ffn.cut("shared", wanted.d_shared, "mixer.shared.down_proj.weight", units, how)


AXIS = Axis(
    name="shared_ffn",
    title="neurons of the shared expert",
    symbol="E",
    fields=("d_shared",),
    measures=("output", "activation"),
    watch=_watch,
    find=_find,
    cut=_cut,
)
