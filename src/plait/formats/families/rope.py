"""Rotary positions in config.json: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of newer ones."""

import math

from plait.formats.error import CheckpointError
from plait.formats.families.family import refuse
from plait.formats.families.fields import Fields
from plait.ops.rope import Rope


def read_rope(fields: Fields, default_base: float, default_context: int) -> Rope:
    """The rotation of a model's attention layers.

    Raises: CheckpointError for a scaling that we do not compute.
    """
    table = fields.table("rope_parameters") or fields.table("rope_scaling")
    base = fields.number("rope_theta", default=default_base)
    share = fields.number("partial_rotary_factor", default=1.0)
    if table is None:
        return Rope(base=base, rotated=_whole(fields, share))
    kind = table.value("rope_type", "type") or "default"
    base = table.number("rope_theta", default=base)
    share = _whole(fields, table.number("partial_rotary_factor", default=share))
    if kind == "default":
        return Rope(base=base, rotated=share)
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"{fields.path}: rope_type = {kind!r} is not supported; known: default, linear, llama3, yarn"
        )
    context = fields.whole("max_position_embeddings", default=default_context)
    original = fields.whole("original_max_position_embeddings", default=0, least=0)
    original = original or table.whole("original_max_position_embeddings", default=context)
    if kind == "linear":
        return Rope(base=base, rotated=share, scaling="linear", stretch=table.number("factor"))
    if kind == "llama3":
        return Rope(
            base=base,
            rotated=share,
            scaling="llama3",
            stretch=table.number("factor"),
            original_context=original,
            low=table.number("low_freq_factor"),
            high=table.number("high_freq_factor"),
        )
    stretch = table.number("factor", default=context / original)
    table.only("truncate", True, why="the borders of YaRN's ramp are whole channels")
    return Rope(
        base=base,
        rotated=share,
        scaling="yarn",
        stretch=stretch,
        original_context=original,
        low=table.number("beta_slow", default=1.0) or 1.0,
        high=table.number("beta_fast", default=32.0) or 32.0,
        temperature=_temperature(table, stretch),
    )


def write_rope(rope: Rope | None, family: str) -> dict[str, object]:
    """The reverse, in both spellings at once: each reader takes the one it knows."""
    if rope is None:
        raise refuse(family, "attention without rotary positions")
    if rope.rotated != 1.0:
        raise refuse(family, f"positions that rotate {rope.rotated:g} of each head")
    extra: dict[str, object] = {}
    if rope.scaling != "none":
        extra["factor"] = rope.stretch
    if rope.scaling in ("llama3", "yarn"):
        extra["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        extra |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.scaling == "yarn":
        extra |= {"beta_slow": rope.low, "beta_fast": rope.high}
        if rope.temperature is not None:
            extra["attention_factor"] = rope.temperature
    kind = {"rope_type": "default" if rope.scaling == "none" else rope.scaling} | extra
    return {
        "rope_theta": rope.base,
        "rope_scaling": kind if extra else None,
        "rope_parameters": {"rope_theta": rope.base} | kind,
    }


def _whole(fields: Fields, share: float) -> float:
    if share != 1.0:
        raise CheckpointError(
            f"{fields.path}: partial_rotary_factor = {share:g}: models of this family rotate whole heads"
        )
    return share


def _temperature(table: Fields, stretch: float) -> float | None:
    """YaRN's factor on cosines and sines; None is the paper's own."""
    if table.has("attention_factor"):
        return table.number("attention_factor")
    one, all_dims = table.number("mscale", default=0.0), table.number("mscale_all_dim", default=0.0)
    if one and all_dims and stretch > 1:
        return (0.1 * one * math.log(stretch) + 1.0) / (0.1 * all_dims * math.log(stretch) + 1.0)
    return None if stretch > 1 else 1.0
