"""What every axis of pruning offers: how its units are watched, how important they are, and how they are cut out.

A unit is what goes as a whole: a neuron, a head, a channel of the residual stream. One file per axis, listed in `AXES`.
A cut keeps the order of the units that stay, and their groups: heads of Mamba-2 that share B and C, query heads that
share a key/value head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plait.compress.edits import Edit
from plait.compress.taps import Taps

# the place of what belongs to no layer
WHOLE = -1
# edits by (name of the tensor, dimension); names begin below the block, or at the model for what belongs to no layer
Edits = dict[tuple[str, int], Edit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What is known of the units of one axis in one layer.

    importance: measure -> (units,) or (groups, units of each), float64, larger is more important; a twin has 0.
    leader: (units,) int64: the unit whose activity this one repeats, itself for most. factor: how many times.
    power: name of a norm's weight -> (groups, units of each): the unit's mean share of the mean square that the norm
    divides by, which sums to one in each group.
    """

    importance: Mapping[str, Tensor]
    leader: Tensor | None = None
    factor: Tensor | None = None
    power: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """by: the measure. merge: add the outputs of twins to the one that stays. rescale: keep the size of what is normed.

    Both off is the published way: entries are taken, nothing else changes. read: gives a tensor of the checkpoint, None
    if it has none of that name.
    """

    by: str
    read: Callable[[str], Tensor | None]
    merge: bool = True
    rescale: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One row of the table of axes.

    name, title: for code, for people. symbol: the kind of layer that has it, "" for what belongs to the whole model.
    fields: of the kind's spec (or of the model's config) that it makes smaller.
    measures: of importance, the usual one first.
    watch: (taps, where, block or model) asks for the sums that it needs; `where` is the prefix of their names.
    find: (sums, where, block or model, tokens) to its units; sums are those that watch asked for.
    cut: (spec, wanted spec, units, how) to the edits of what its fields say, whatever the other fields of the wanted
        spec; None where there is nothing to cut in a tensor.
    """

    name: str
    title: str
    symbol: str
    fields: tuple[str, ...]
    measures: tuple[str, ...]
    watch: Callable[[Taps, str, Any], None]
    find: Callable[[Mapping[str, Tensor], str, Any, int], Units]
    cut: Callable[[Any, Any, Units, How], Edits] | None


def best(importance: Tensor, n: int) -> Tensor:
    """Which n units of each group stay.

    Args:
        importance: (units,) or (groups, units of each).
        n: how many of each group.

    Returns: (n,) or (groups, n) indices inside the group, ascending; of equals, the first ones stay.
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order[..., :n].sort(dim=-1).values


def flat(chosen: Tensor, size: int) -> Tensor:
    """Indices (groups, n) inside groups of `size` as indices among all units."""
    return (chosen + size * torch.arange(chosen.shape[0])[:, None]).flatten()


def spread(units: Tensor, size: int) -> Tensor:
    """Indices of units as indices of their `size` entries each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def merging(kept: Tensor, units: Units, how: How) -> Edit:
    """What happens to the columns that read these units: kept ones are taken, and twins that go are added to theirs."""
    leader, factor = units.leader, units.factor
    taken = Edit.take(kept)
    if not how.merge or leader is None or factor is None:
        return taken
    place = torch.full((len(leader),), -1)
    place[kept] = torch.arange(len(kept))
    gone = (place < 0).nonzero()[:, 0]
    gone = gone[(leader[gone] != gone) & (place[leader[gone]] >= 0)]
    if not len(gone):
        return taken
    new, old = torch.cat([taken.new, place[leader[gone]]]), torch.cat([kept, gone])
    weight = torch.cat([taken.weight, factor[gone].double()])
    order = new.argsort(stable=True)
    return Edit(n=len(kept), new=new[order], old=old[order], weight=weight[order])


def spread_edit(edit: Edit, size: int) -> Edit:
    """The edit of units as that of their `size` entries each."""
    weight = edit.weight.repeat_interleave(size)
    return Edit(n=edit.n * size, new=spread(edit.new, size), old=spread(edit.old, size), weight=weight)


def behind(edit: Edit, kept: Tensor, norm: Tensor | None) -> Edit:
    """The edit of columns that read behind a norm: twins are so before its weight, which may differ between them.

    Args:
        edit: from `merging`, of entries. kept: the entries that are kept, ascending. norm: the weight, None for none.
    """
    if norm is None or edit.only_takes:
        return edit
    w, leader = norm.double(), kept[edit.new]
    ratio = torch.where(edit.old == leader, 1.0, w[edit.old] / w[leader])
    return Edit(n=edit.n, new=edit.new, old=edit.old, weight=edit.weight * ratio)


def rescaling(power: Tensor, chosen: Tensor, how: How) -> Tensor:
    """By what a norm's weight is multiplied in each group, so that what stays is divided by as much as before.

    The mean square over what stays is, on average, kept share of power x old count / new count times the old one.

    Args:
        power: (groups, units of each). chosen: (groups, n).

    Returns: (groups,) float64.
    """
    if not how.rescale or chosen.shape[-1] == power.shape[-1]:
        return torch.ones(power.shape[0]).double()
    share = power.gather(-1, chosen).sum(-1) / power.sum(-1)
    ratio = (share * power.shape[-1] / chosen.shape[-1]).sqrt()
    # a group in which nothing ever happens
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def tiled(edit: Edit, repeats: int, size: int) -> Edit:
    """The edit of the entries of one unit of `size` as that of `repeats` units."""
    of = torch.arange(repeats)[:, None]
    new, old = (edit.new + of * edit.n).flatten(), (edit.old + of * size).flatten()
    return Edit(n=edit.n * repeats, new=new, old=old, weight=edit.weight.repeat(repeats))


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What an output projection reads of units of P channels each, as it was before a norm's weight, if there is one.

    sketch: (units, P, K). moments: (units, P, P). columns: (units, P, d_model) that read them, the weight included.
    """

    sketch: Tensor
    moments: Tensor
    columns: Tensor

    @property
    def square(self) -> Tensor:
        """(units, P) sums of squares."""
        return self.moments.diagonal(dim1=1, dim2=2)


def read_of(sums: Mapping[str, Tensor], tap: str, linear: nn.Module, norm: Tensor | None, size: int) -> Read:
    """What a tap in front of a linear layer has seen; a channel that the norm's weight hides counts as silent."""
    w = torch.ones(sums[f"{tap}.sketch"].shape[0]).double() if norm is None else norm.detach().cpu().double()
    inverse = torch.where(w == 0, 0.0, 1 / w).view(-1, size)
    return Read(
        sketch=sums[f"{tap}.sketch"].unflatten(0, (-1, size)) * inverse[..., None],
        moments=sums[f"{tap}.moments"] * inverse[:, :, None] * inverse[:, None],
        columns=(weight_of(linear).T.double() * w[:, None]).unflatten(0, (-1, size)),
    )


def powers(square: Tensor, norm: Tensor) -> Tensor:
    """(D,) sums of squares of a norm's outputs, as they were before its weight (D,) scaled them."""
    norm = norm.detach().cpu().double()
    return torch.where(norm == 0, 0.0, square / norm.square())


def output_norms(columns: Tensor, moments: Tensor, tokens: int) -> Tensor:
    """Root mean square of what units send into the stream, |W_u y_u| over tokens.

    Args:
        columns: (units, P, d): of the output projection, those that read each unit.
        moments: (units, P, P): sums of y_u y_u^T over tokens.

    Returns: (units,) float64.
    """
    # |W y|^2 = tr(W^T W y y^T), W^T the columns
    energy = [((c @ c.mT) * m).sum() for c, m in zip(columns, moments, strict=True)]
    return (torch.stack(energy) / tokens).clamp(min=0).sqrt()


def weight_of(linear: nn.Module) -> Tensor:
    """(d_out, d_in) of a linear layer, in float32 or float64, on the CPU.

    Raises: ValueError for a layer whose weight is scaled elsewhere.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError("layers with sigma_reparam=true cannot be scored or cut; fold the norm into the weight first")
    return weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32))
