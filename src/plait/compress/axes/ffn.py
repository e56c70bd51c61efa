"""Neurons of feed-forward layers: rows of the input projections, a column of the output projection.

    activation   sqrt( sum over sequences of (mean over tokens of |a_j|)^2 )        a: what the output projection reads
    output       sqrt( mean over tokens of a_j^2 ) |W_down[:, j]|                   what the neuron sends to the stream

Source   Muralidharan et al. 2024, arXiv:2407.14679 section 2.2 (activation).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.axis import Axis, Edits, How, Units, best, merging, powers, rescaling, weight_of
from plait.compress.dims import taking
from plait.compress.edits import Edit
from plait.compress.taps import Taps
from plait.compress.twins import merged, twins
from plait.model.hybrid import Block
from plait.model.layers.mlp import MLP, MLPMixer


def watch(taps: Taps, where: str, mixer: MLPMixer) -> None:
    """Ask for the sums of what the output projection reads."""
    taps.input(f"{where}.out", mixer.down_proj, taps.fold(f"{where}.out"))


def find(sums: Mapping[str, Tensor], where: str, mixer: MLPMixer, tokens: int) -> Units:
    """Importance, twins and, with a sub-norm, shares of its mean square."""
    square, columns = sums[f"{where}.out.square"], weight_of(mixer.down_proj).T.double()
    leader, factor = twins(sums[f"{where}.out.sketch"])
    first = leader == torch.arange(len(leader))
    power = {}
    if mixer.sub_norm is not None:
        power["mixer.sub_norm.weight"] = powers(square, mixer.sub_norm.weight)[None]
    importance = {
        "output": (square / tokens).sqrt() * merged(columns, leader, factor).norm(dim=1),
        "activation": sums[f"{where}.out.l1"].sqrt() * first,
    }
    return Units(importance=importance, leader=leader, factor=factor, power=power)


def cut(label: str, n: int, reader: str, units: Units, how: How) -> Edits:
    """Keep the best n of the neurons with this label, whose outputs the tensor `reader` reads."""
    kept = best(units.importance[how.by], n)
    edits = taking("E" if label == "shared" else "-", {label: kept})
    edits[reader, 1] = merging(kept, units, how)
    for name, power in units.power.items():
        edits[name, 0] = edits[name, 0].then(Edit.scale(rescaling(power, kept[None], how).expand(n)))
    return edits


def _watch(taps: Taps, where: str, block: Block) -> None:
    watch(taps, where, block.mixer)  # type: ignore[arg-type]


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    return find(sums, where, block.mixer, tokens)  # type: ignore[arg-type]


def _cut(spec: MLP, wanted: MLP, units: Units, how: How) -> Edits:
    return cut("ffn", wanted.d_ff, "mixer.down_proj.weight", units, how)


AXIS = Axis(
    name="ffn",
    title="feed-forward neurons",
    symbol="-",
    fields=("d_ff",),
    measures=("output", "activation"),
    watch=_watch,
    find=_find,
    cut=_cut,
)
