"""The axes along which models are made smaller: one file each, listed here."""

from plait.compress.axes import (
    attention_heads,
    depth,
    experts,
    ffn,
    kv_heads,
    mamba_channels,
    mamba_heads,
    shared_ffn,
    ssm_state,
    width,
)

AXES = {
    "depth": depth.AXIS,
    "width": width.AXIS,
    "ffn": ffn.AXIS,
    "mamba_heads": mamba_heads.AXIS,
    "mamba_channels": mamba_channels.AXIS,
    "ssm_state": ssm_state.AXIS,
    "attention_heads": attention_heads.AXIS,
    "kv_heads": kv_heads.AXIS,
    "experts": experts.AXIS,
    "shared_ffn": shared_ffn.AXIS,
}
