"""Which axes each tensor of a layer has: the map by which one cut reaches every tensor that it concerns.

Labels of dimensions, first to last; "" is never cut:

    width   the residual stream           inner   n_heads x head_dim of Mamba-2      q    query heads x head_dim
    ffn     neurons                       in      rows [z, x, B, C, dt]              kv   key/value heads x head_dim
    experts, shared (its neurons)         conv    channels [x, B, C]                 heads
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from plait.compress.edits import Edit
from plait.model.layer import LayerSpec
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.moe import MoE

OUTSIDE: dict[str, tuple[str, ...]] = {
    "embed.weight": ("", "width"),
    "norm.weight": ("width",),
    "head.weight": ("", "width"),
}
BLOCK: dict[str, tuple[str, ...]] = {"norm.weight": ("width",), "post_norm.weight": ("width",), "scale": ("width",)}
MAMBA2: dict[str, tuple[str, ...]] = {
    "mixer.in_proj.weight": ("in", "width"),
    "mixer.in_proj.bias": ("in",),
    "mixer.conv.weight": ("conv", ""),
    "mixer.conv.bias": ("conv",),
    "mixer.A_log": ("heads",),
    "mixer.D": ("heads",),
    "mixer.dt_bias": ("heads",),
    "mixer.norm.weight": ("inner",),
    "mixer.out_proj.weight": ("width", "inner"),
    "mixer.out_proj.bias": ("width",),
}
ATTENTION: dict[str, tuple[str, ...]] = {
    "mixer.q_proj.weight": ("q", "width"),
    "mixer.q_proj.bias": ("q",),
    "mixer.k_proj.weight": ("kv", "width"),
    "mixer.k_proj.bias": ("kv",),
    "mixer.v_proj.weight": ("kv", "width"),
    "mixer.v_proj.bias": ("kv",),
    "mixer.q_norm.weight": ("",),
    "mixer.k_norm.weight": ("",),
    "mixer.v_norm.weight": ("",),
    "mixer.sub_norm.weight": ("q",),
    "mixer.o_proj.weight": ("width", "q"),
    "mixer.o_proj.bias": ("width",),
}
MLP: dict[str, tuple[str, ...]] = {
    "mixer.up_proj.weight": ("ffn", "width"),
    "mixer.up_proj.bias": ("ffn",),
    "mixer.gate_proj.weight": ("ffn", "width"),
    "mixer.gate_proj.bias": ("ffn",),
    "mixer.sub_norm.weight": ("ffn",),
    "mixer.down_proj.weight": ("width", "ffn"),
    "mixer.down_proj.bias": ("width",),
}
MOE: dict[str, tuple[str, ...]] = {
    "mixer.router.weight": ("experts", "width"),
    "mixer.router.correction": ("experts",),
    "mixer.experts.up": ("experts", "", "latent"),
    "mixer.experts.down": ("experts", "latent", ""),
    "mixer.shared.up_proj.weight": ("shared", "width"),
    "mixer.shared.up_proj.bias": ("shared",),
    "mixer.shared.down_proj.weight": ("width", "shared"),
    "mixer.shared.down_proj.bias": ("width",),
    "mixer.latent_in.weight": ("", "width"),
    "mixer.latent_in.bias": ("",),
    "mixer.latent_out.weight": ("width", ""),
    "mixer.latent_out.bias": ("width",),
}
DIMS = {"M": MAMBA2, "*": ATTENTION, "-": MLP, "E": MOE}


def outputs(spec: LayerSpec) -> tuple[str, ...]:
    """The tensors by which all that a block adds to the stream is multiplied, names below the block."""
    if spec.post_norm:
        return ("post_norm.weight",)
    if isinstance(spec, MoE):
        routed = ("experts.down",) if spec.d_latent is None else ("latent_out.weight", "latent_out.bias")
        return tuple(f"mixer.{name}" for name in (*routed, "shared.down_proj.weight", "shared.down_proj.bias"))
    name = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[spec.symbol]
    return f"mixer.{name}.weight", f"mixer.{name}.bias"


def places(symbol: str, label: str) -> list[tuple[str, int]]:
    """Where a label stands in a block of this kind: (tensor, dimension), names below the block."""
    table = BLOCK | DIMS[symbol]
    return [(name, dim) for name, labels in table.items() for dim, found in enumerate(labels) if found == label]


def mamba2_rows(spec: Mamba2, inner: Tensor, state: Tensor, heads: Tensor) -> dict[str, Tensor]:
    """What stays of a Mamba-2 mixer, by label.

    Args:
        spec: as it is.
        inner: among n_heads x head_dim. state: among n_groups x d_state. heads: among n_heads.
    """
    d, shared = spec.d_inner, spec.n_groups * spec.d_state
    rows = torch.cat([inner, d + inner, 2 * d + state, 2 * d + shared + state, 2 * d + 2 * shared + heads])
    return {
        "in": rows,
        "conv": torch.cat([inner, d + state, d + shared + state]),
        "heads": heads,
        "inner": inner,
    }


def taking(symbol: str, kept: Mapping[str, Tensor]) -> dict[tuple[str, int], Edit]:
    """The edits of a block that take what stays of each label."""
    return {at: Edit.take(index) for label, index in kept.items() for at in places(symbol, label)}
