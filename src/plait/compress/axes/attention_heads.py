"""Query heads, ranked inside the group that shares a key/value head, so that each group keeps as many.

    activation   sqrt( mean over tokens of |y_h|^2 )                 y: the head's output, before the output projection
    output       sqrt( mean over tokens of |W_h y_h|^2 )             W_h: the columns that read it

Fewer key/value heads (kv_heads.py): where heads per key/value head stay as many or become fewer, whole groups go; where
they become more, neighbouring key/value heads are averaged and keep the query heads of all of them.

Source   Muralidharan et al. 2024, arXiv:2407.14679 (activation); Ainslie et al. 2023, arXiv:2305.13245 (averaging).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.axis import (
    Axis,
    Edits,
    How,
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
from plait.compress.dims import places, taking
from plait.compress.edits import Edit
from plait.compress.taps import Taps
from plait.compress.twins import merged, twins
from plait.model.hybrid import Block
from plait.model.layers.attention import Attention, AttentionMixer

NORM, READER = "mixer.sub_norm.weight", "mixer.o_proj.weight"


def watch(taps: Taps, where: str, block: Block) -> None:
    """Ask for the sums that heads are scored by."""
    assert isinstance(block.mixer, AttentionMixer)
    taps.input(f"{where}.out", block.mixer.o_proj, taps.fold(f"{where}.out", size=block.mixer.spec.head_dim, l1=False))


def find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    """Importance (K, H / K), twins and, with a sub-norm, shares of its mean square."""
    mixer = block.mixer
    assert isinstance(mixer, AttentionMixer)
    s = mixer.spec
    norm = None if mixer.sub_norm is None else mixer.sub_norm.weight
    read = read_of(sums, f"{where}.out", mixer.o_proj, norm, s.head_dim)
    groups = (s.n_kv_heads, s.n_heads // s.n_kv_heads)
    leader, factor = twins(read.sketch.flatten(1))
    first = leader == torch.arange(s.n_heads)
    square = sums[f"{where}.out.moments"].diagonal(dim1=1, dim2=2)
    importance = {
        "output": output_norms(merged(read.columns, leader, factor), read.moments, tokens).view(groups),
        "activation": ((square.sum(1) / tokens).sqrt() * first).view(groups),
    }
    power = {} if norm is None else {NORM: read.square.sum(1)[None]}
    return Units(importance=importance, leader=leader, factor=factor, power=power)


def _cut(spec: Attention, wanted: Attention, units: Units, how: How) -> Edits:
    K, P, per = spec.n_kv_heads, spec.head_dim, wanted.n_heads // wanted.n_kv_heads
    importance, keys = units.importance[how.by], Edit.take(torch.arange(K))
    if wanted.n_kv_heads < K and per > spec.n_heads // K:
        n = K // wanted.n_kv_heads
        keys = Edit(n=K // n, new=torch.arange(K) // n, old=torch.arange(K), weight=torch.full((K,), 1 / n).double())
        importance = importance.view(K // n, -1)
        heads = flat(best(importance, per), importance.shape[1])
    else:
        worth = importance.sort(dim=1, descending=True).values[:, :per].square().sum(1)
        groups = best(worth, wanted.n_kv_heads)
        keys = Edit.take(groups)
        heads = (best(importance[groups], per) + importance.shape[1] * groups[:, None]).flatten()
    inner = spread(heads, P)
    edits = taking("*", {"q": inner})
    edits |= {place: spread_edit(keys, P) for place in places("*", "kv")}
    edits[READER, 1] = behind(spread_edit(merging(heads, units, how), P), inner, how.read(NORM))
    for name, power in units.power.items():
        ratio = rescaling(power, heads[None], how)
        edits[name, 0] = edits[name, 0].then(Edit.scale(ratio.expand(len(heads) * P)))
    return edits


AXIS = Axis(
    name="attention_heads",
    title="attention heads",
    symbol="*",
    fields=("n_heads", "n_kv_heads"),
    measures=("output", "activation"),
    watch=watch,
    find=find,
    cut=_cut,
)
