"""Experts, ranked inside the groups that a router chooses from, so that each group keeps as many.

    activation   mean over the tokens that chose it of |y_e|                   y_e: the expert's output
    output       sqrt( mean over tokens of (w_e |y_e|)^2 )                     w_e: its weight, 0 where it is not chosen

Experts are run again for every STRIDE-th token, since their sum alone leaves the layer. A few tokens of the first batch
pass every expert: those whose outputs are proportional there are twins, and only the first of them is worth anything.
Twins are not merged: with fewer experts, a router that must choose as many takes another one.

Source   Muralidharan et al. 2024 and NVIDIA's Model Optimizer (activation); Lasby et al. 2025, arXiv:2510.13999.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.compress.axis import Axis, Edits, How, Units, best, flat
from plait.compress.dims import taking
from plait.compress.taps import Taps
from plait.compress.twins import twins
from plait.model.hybrid import Block
from plait.model.layers.moe import MoE, MoEMixer
from plait.ops.activation import squared_relu
from plait.ops.moe import route

STRIDE, PROBES = 4, 8


def _watch(taps: Taps, where: str, block: Block) -> None:
    mixer = block.mixer
    assert isinstance(mixer, MoEMixer)
    s = mixer.spec

    def run(expert: int, rows: Tensor) -> Tensor:
        up, down = mixer.experts.up[expert].to(rows.dtype), mixer.experts.down[expert].to(rows.dtype)
        y = squared_relu(rows @ up.T) @ down.T
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def hook(x: Tensor) -> None:
        rows = x.flatten(0, 1)[::STRIDE]
        weights, chosen = route(
            F.linear(rows.float(), mixer.router.weight.float()),
            mixer.router.correction,
            n_chosen=s.n_chosen,
            n_groups=s.n_groups,
            n_top_groups=s.n_top_groups,
            normalises=s.normalises,
            scale=s.scale,
        )
        inner = rows if mixer.latent_in is None else mixer.latent_in(rows)
        sums = torch.zeros(3, s.n_experts, dtype=torch.float64)
        for expert in range(s.n_experts):
            at, choice = (chosen == expert).nonzero(as_tuple=True)
            if len(at):
                norms = run(expert, inner[at]).norm(dim=1)
                sums[0, expert] = (norms * weights[at, choice]).square().sum()
                sums[1, expert], sums[2, expert] = norms.sum(), len(at)
        taps.add(f"{where}.experts", sums)
        if taps.batch == 0:
            probes = inner[:: max(len(inner) // PROBES, 1)][:PROBES]
            taps.add(f"{where}.probes", torch.stack([run(e, probes).flatten() for e in range(s.n_experts)]))

    taps.input(f"{where}.experts", mixer, hook)


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    assert isinstance(block.mixer, MoEMixer)
    squares, norms, counts = sums[f"{where}.experts"]
    leader, factor = twins(sums[f"{where}.probes"])
    first = leader == torch.arange(len(leader))
    groups = (block.mixer.spec.n_groups, -1)
    importance = {
        "output": ((squares * STRIDE / tokens).sqrt() * first).view(groups),
        "activation": (norms / counts.clamp(min=1) * first).view(groups),
    }
    return Units(importance=importance, leader=leader, factor=factor)


def _cut(spec: MoE, wanted: MoE, units: Units, how: How) -> Edits:
    chosen = best(units.importance[how.by], wanted.n_experts // spec.n_groups)
    return taking("E", {"experts": flat(chosen, spec.n_experts // spec.n_groups)})


AXIS = Axis(
    name="experts",
    title="experts",
    symbol="E",
    fields=("n_experts", "n_chosen"),
    measures=("output", "activation"),
    watch=_watch,
    find=_find,
    cut=_cut,
)
