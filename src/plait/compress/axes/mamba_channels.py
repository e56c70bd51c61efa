"""Channels of Mamba-2 heads: head_dim is one number, so the same channels stay in every head.

    activation   sqrt( sum over heads and over sequences of (mean over tokens of |x_p|)^2 )
    output       sqrt( sum over heads of mean over tokens of y_p^2 |W_hp|^2 ),   as for heads (mamba_heads.py)

Source   Taghibakhshi et al. 2025, arXiv:2504.11409 (activation).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.axes.mamba_heads import NORM, READER, read_by_output, watch
from plait.compress.axis import Axis, Edits, How, Units, behind, best, merging, rescaling, spread, tiled
from plait.compress.dims import mamba2_rows, taking
from plait.compress.edits import Edit
from plait.compress.twins import merged, twins
from plait.model.hybrid import Block
from plait.model.layers.mamba2 import Mamba2, Mamba2Mixer


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Mixer)
    s, read = mixer.spec, read_by_output(sums, where, mixer)
    leader, factor = twins(read.sketch.transpose(0, 1).flatten(1))
    first = leader == torch.arange(s.head_dim)
    columns = merged(read.columns.transpose(0, 1), leader, factor)  # (P, H, d_model)
    loud = sums[f"{where}.x.l1"].unflatten(0, (s.n_heads, -1)).sum(0).sqrt()
    importance = {
        "output": (columns.square().sum(2) * read.square.T / tokens).sum(1).sqrt(),
        "activation": loud * first,
    }
    by_group = read.square.unflatten(0, (s.n_groups, -1)).sum(1)  # (G, P)
    return Units(importance=importance, leader=leader, factor=factor, power={NORM: by_group})


def _cut(spec: Mamba2, wanted: Mamba2, units: Units, how: How) -> Edits:
    H, P, n = spec.n_heads, spec.head_dim, wanted.head_dim
    kept = best(units.importance[how.by], n)
    inner = (spread(torch.arange(H), P).view(H, P)[:, kept]).flatten()
    edits = taking("M", mamba2_rows(spec, inner, torch.arange(spec.n_groups * spec.d_state), torch.arange(H)))
    edits[READER, 1] = behind(tiled(merging(kept, units, how), H, P), inner, how.read(NORM))
    for name, power in units.power.items():
        ratio = rescaling(power, kept.expand(spec.n_groups, -1), how).repeat_interleave(H // spec.n_groups * n)
        edits[name, 0] = edits[name, 0].then(Edit.scale(ratio))
    return edits


AXIS = Axis(
    name="mamba_channels",
    title="channels of Mamba-2 heads",
    symbol="M",
    fields=("head_dim",),
    measures=("output", "activation"),
    watch=watch,
    find=_find,
    cut=_cut,
)
