"""Heads of Mamba-2, ranked inside their group: those of a group share B and C, so each group keeps as many.

    activation   sqrt( sum over the head's channels and over sequences of (mean over tokens of |x|)^2 )
                 x: the slice of the input projection, as published; blind to gate, norm, D and what reads the head
    output       sqrt( mean over tokens of |W_h y_h|^2 ),   y: the gated norm's output, W_h: the columns that read it

One cut goes through rows z, x and dt of the input projection, the convolution's channels of x, A_log, D, dt_bias, the
gated norm's weight and the output projection's columns. The norm then divides by the mean over the heads that stay.

Source   Taghibakhshi et al. 2025, arXiv:2504.11409 (groups; activation, there over the channels that stay).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.axis import (
    Axis,
    Edits,
    How,
    Read,
    Units,
    behind,
    best,
    flat,
    merging,
    output_norms,
    read_of,
    rescaling,
    spread,
    spread_edit,
)
from plait.compress.dims import mamba2_rows, taking
from plait.compress.edits import Edit
from plait.compress.taps import Taps
from plait.compress.twins import merged, twins
from plait.model.hybrid import Block
from plait.model.layers.mamba2 import Mamba2, Mamba2Mixer

NORM, READER = "mixer.norm.weight", "mixer.out_proj.weight"


def watch(taps: Taps, where: str, block: Block) -> None:
    """Ask for the sums that heads and their channels are scored by."""
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Mixer)
    d = mixer.spec.d_inner
    fold = taps.fold(f"{where}.x", sketch=False)
    taps.output(f"{where}.x", mixer.in_proj, lambda y: fold(y[..., d : 2 * d]))
    taps.input(f"{where}.out", mixer.out_proj, taps.fold(f"{where}.out", size=mixer.spec.head_dim, l1=False))


def read_by_output(sums: Mapping[str, Tensor], where: str, mixer: Mamba2Mixer) -> Read:
    """What the output projection reads of each head."""
    return read_of(sums, f"{where}.out", mixer.out_proj, mixer.norm.weight, mixer.spec.head_dim)


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Mixer)
    s, read = mixer.spec, read_by_output(sums, where, mixer)
    groups = (s.n_groups, s.n_heads // s.n_groups)
    leader, factor = twins(read.sketch.flatten(1))
    first = leader == torch.arange(s.n_heads)
    loud = sums[f"{where}.x.l1"].unflatten(0, (s.n_heads, -1)).sum(1).sqrt()
    importance = {
        "output": output_norms(merged(read.columns, leader, factor), read.moments, tokens).view(groups),
        "activation": (loud * first).view(groups),
    }
    return Units(importance=importance, leader=leader, factor=factor, power={NORM: read.square.sum(1).view(groups)})


def _cut(spec: Mamba2, wanted: Mamba2, units: Units, how: How) -> Edits:
    G, P, shared = spec.n_groups, spec.head_dim, spec.n_groups * spec.d_state
    chosen = best(units.importance[how.by], wanted.n_heads // G)
    kept = flat(chosen, spec.n_heads // G)
    inner = spread(kept, P)
    edits = taking("M", mamba2_rows(spec, inner, torch.arange(shared), kept))
    edits[READER, 1] = behind(spread_edit(merging(kept, units, how), P), inner, how.read(NORM))
    for name, power in units.power.items():
        ratio = rescaling(power, chosen, how).repeat_interleave(wanted.n_heads // G * P)
        edits[name, 0] = edits[name, 0].then(Edit.scale(ratio))
    return edits


AXIS = Axis(
    name="mamba_heads",
    title="heads of Mamba-2",
    symbol="M",
    fields=("n_heads",),
    measures=("output", "activation"),
    watch=watch,
    find=_find,
    cut=_cut,
)
