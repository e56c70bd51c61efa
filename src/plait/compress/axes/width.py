"""Channels of the residual stream: one number for the whole model, tied to every tensor that touches the stream.

    activation   sum over norms of sqrt( sum over sequences of (mean over tokens of |a_j|)^2 )      a: a norm's output
    output       sum over norms of the channel's share of  mean over tokens of a_j^2 |W[:, j]|^2    W: all that reads a

A cut takes columns of the embedding and of everything that reads the stream, rows of everything that writes to it, and
entries of the norms between. Twins are channels proportional in the stream itself, hence before every norm's weight;
they are merged where the head is not the embedding, whose columns write and read.

Source   Muralidharan et al. 2024, arXiv:2407.14679 section 2.2 (activation).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from plait.compress.axis import Axis, Edits, How, Units, behind, best, merging, powers, rescaling, weight_of
from plait.compress.dims import BLOCK, DIMS, OUTSIDE
from plait.compress.edits import Edit
from plait.compress.taps import Taps
from plait.compress.twins import twins
from plait.model.config import ModelConfig
from plait.model.hybrid import Block, Hybrid
from plait.model.layer import LayerSpec, Norm
from plait.model.layers.moe import MoE, MoEMixer

# what reads the normed stream, by kind of layer
READERS = {
    "M": ("mixer.in_proj",),
    "*": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "-": ("mixer.up_proj", "mixer.gate_proj"),
    "E": ("mixer.router", "mixer.shared.up_proj", "mixer.latent_in"),
}


def _norms(model: Hybrid) -> dict[str, Norm]:
    """All norms over the stream's channels, by name."""
    found: dict[str, Norm] = {}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        parts = {"norm": block.norm, "post_norm": block.post_norm}
        found |= {f"blocks.{i}.{name}": norm for name, norm in parts.items() if norm is not None}
    return found | {"norm": model.norm}


def _watch(taps: Taps, where: str, model: Hybrid) -> None:
    for name, norm in _norms(model).items():
        taps.output(name, norm, taps.fold(name, sketch=not name.endswith("post_norm")))


def _find(sums: Mapping[str, Tensor], where: str, model: Hybrid, tokens: int) -> Units:
    norms = _norms(model)
    loud = sum((sums[f"{name}.l1"].sqrt() for name in norms), torch.zeros(()).double())
    output = torch.zeros(model.config.d_model, dtype=torch.float64)
    for name in norms:
        if not name.endswith("post_norm"):
            read = sums[f"{name}.square"] / tokens * _read_by(model, name)
            output += read / read.sum().clamp(min=torch.finfo(read.dtype).tiny)
    power = {f"{name}.weight": powers(sums[f"{name}.square"], norm.weight)[None] for name, norm in norms.items()}
    if model.config.ties_embeddings:
        return Units(importance={"activation": loud, "output": output}, power=power)
    leader, factor = _twins(sums, norms)
    first = leader == torch.arange(len(leader))
    return Units(
        importance={"activation": loud * first, "output": output * first}, leader=leader, factor=factor, power=power
    )


def _read_by(model: Hybrid, norm: str) -> Tensor:
    """(D,) squared norms of the columns that read a norm's output."""
    if norm == "norm":
        # the largest matrix there is: some rows at a time
        rows = model.head_weight.detach().split(1024)
        return torch.stack([part.cpu().double().square().sum(0) for part in rows]).sum(0)
    block = model.get_submodule(norm.rpartition(".")[0])
    assert isinstance(block, Block)
    total = torch.zeros(model.config.d_model, dtype=torch.float64)
    for name in READERS[_symbol(model, block)]:
        module: nn.Module | None = block
        for part in name.split("."):
            module = getattr(module, part, None)
        if module is not None:
            total += weight_of(module).double().square().sum(0)
    if isinstance(block.mixer, MoEMixer) and block.mixer.latent_in is None:
        total += block.mixer.experts.up.detach().cpu().double().square().sum((0, 1))
    return total


def _symbol(model: Hybrid, block: Block) -> str:
    return next(spec.symbol for spec, other in zip(model.config.layers, model.blocks, strict=True) if other is block)


def _twins(sums: Mapping[str, Tensor], norms: Mapping[str, Norm]) -> tuple[Tensor, Tensor]:
    """Channels that are proportional in the stream wherever it is normed."""
    sketches, silent = [], torch.zeros(())
    for name, norm in norms.items():
        if not name.endswith("post_norm"):
            w = norm.weight.detach().cpu().double()
            silent = silent + (w == 0)
            sketches.append(torch.where(w[:, None] == 0, 0.0, sums[f"{name}.sketch"] / w[:, None]))
    together = torch.cat(sketches, dim=1)
    # what a norm hides cannot be told from its output, nor led from there
    return twins(together * (silent == 0)[:, None])


def labels(spec: LayerSpec) -> dict[str, tuple[str, ...]]:
    """The dimensions of a block's tensors; experts without a latent width work in the stream's."""
    table = BLOCK | DIMS[spec.symbol]
    if isinstance(spec, MoE) and spec.d_latent is None:
        return {name: tuple("width" if d == "latent" else d for d in dims) for name, dims in table.items()}
    return table


def _cut(spec: ModelConfig, wanted: ModelConfig, units: Units, how: How) -> Edits:
    kept = best(units.importance[how.by], wanted.d_model)
    every = {name: ("", dims) for name, dims in OUTSIDE.items()}
    for i, layer in enumerate(spec.layers):
        every |= {f"blocks.{i}.{name}": (f"blocks.{i}.", dims) for name, dims in labels(layer).items()}

    def reading(norm: str) -> Edit:
        # a layer without this norm reads the stream as it is
        return behind(merging(kept, units, how), kept, how.read(norm))

    edits: Edits = {}
    for name, (where, dims) in every.items():
        for dim, label in enumerate(dims):
            if label == "width":
                # of matrices (d_out, d_in), the last dimension reads, the others write
                reads = dim == len(dims) - 1 > 0 and name != "embed.weight" and not name.endswith("experts.down")
                edits[name, dim] = reading(f"{where}norm.weight") if reads else Edit.take(kept)
    for name, power in units.power.items():
        ratio = rescaling(power, kept[None], how)
        edits[name, 0] = edits.get((name, 0), Edit.take(kept)).then(Edit.scale(ratio.expand(len(kept))))
    return edits


AXIS = Axis(
    name="width",
    title="channels of the residual stream",
    symbol="",
    fields=("d_model",),
    measures=("activation", "output"),
    watch=_watch,
    find=_find,
    cut=_cut,
)
