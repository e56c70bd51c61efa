"""Pure Mamba-2 models: `mamba2`, and the names of Mamba-2 layers that nemotron_h shares.

Source   config.json of the published models as transformers 5.23 reads them.
"""

import math

from plait.formats.families.family import Family, one_of_kind, refuse, shared_fields, write_shared
from plait.formats.families.fields import Fields
from plait.formats.rules import Names, rule
from plait.model.config import ModelConfig
from plait.model.layers.mamba2 import Mamba2

LAYER = "backbone.layers.{n}."
OUTSIDE = (
    rule("embed.weight", "backbone.embeddings.weight", "vocab_size and hidden_size"),
    rule("norm.weight", "backbone.norm_f.weight", "hidden_size"),
    rule("head.weight", "lm_head.weight", "vocab_size and hidden_size"),
)
NORM = rule("norm.weight", LAYER + "norm.weight", "hidden_size")
_ROWS = "the numbers and sizes of heads, the groups and the state size"
MAMBA2 = (
    NORM,
    rule("mixer.in_proj.weight", LAYER + "mixer.in_proj.weight", f"hidden_size, {_ROWS}"),
    rule("mixer.in_proj.bias", LAYER + "mixer.in_proj.bias", _ROWS),
    rule("mixer.conv.weight", LAYER + "mixer.conv1d.weight", f"conv_kernel, {_ROWS}", axis=1),
    rule("mixer.conv.bias", LAYER + "mixer.conv1d.bias", _ROWS),
    rule("mixer.A_log", LAYER + "mixer.A_log", "the number of heads"),
    rule("mixer.D", LAYER + "mixer.D", "the number of heads"),
    rule("mixer.dt_bias", LAYER + "mixer.dt_bias", "the number of heads"),
    rule("mixer.norm.weight", LAYER + "mixer.norm.weight", "the number and size of heads"),
    rule("mixer.out_proj.weight", LAYER + "mixer.out_proj.weight", "hidden_size, the number and size of heads"),
    rule("mixer.out_proj.bias", LAYER + "mixer.out_proj.bias", "hidden_size"),
)
SPELLINGS = (
    (r"^model\.backbone\.", "backbone."),
    (r"^model\.", "backbone."),
    (r"^backbone\.(embedding|embed_tokens)\.", "backbone.embeddings."),
    (r"^backbone\.norm\.", "backbone.norm_f."),
    (r"\.mixer\._fp32_params\.", ".mixer."),
)
NAMES = Names(rules={"": OUTSIDE, "M": MAMBA2}, spellings=SPELLINGS)


def limit(fields: Fields, *names: str) -> tuple[float, float]:
    """Bounds of the time step; infinity is written in two ways, and absent means no bounds."""
    value = fields.value(*names)
    if value is None:
        return (0.0, math.inf)
    pair = [_number(item) for item in value] if isinstance(value, list) else []
    if len(pair) != 2 or None in pair:
        raise fields.wrong(names[0], value, "a list of two numbers, lower and upper bound")
    low, high = pair
    assert low is not None and high is not None
    return (low, high)


def write_limit(spec: Mamba2) -> dict[str, object]:
    """Only bounds that bind: JSON has no infinity, and absent means none."""
    if spec.dt_limit == (0.0, math.inf):
        return {}
    return {"time_step_limit": list(spec.dt_limit)}


def _number(item: object) -> float | None:
    if isinstance(item, dict):
        item = item.get("__float__")
    if isinstance(item, str) and item.lower().lstrip("-") in ("infinity", "inf"):
        return -math.inf if item.startswith("-") else math.inf
    return float(item) if isinstance(item, int | float) and not isinstance(item, bool) else None


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "swish", why="the convolution is followed by SiLU")
    bias = fields.flag("use_bias", default=False)
    spec = Mamba2(
        n_heads=fields.whole("num_heads"),
        head_dim=fields.whole("head_dim", default=64),
        d_state=fields.whole("state_size", default=128),
        n_groups=fields.whole("n_groups", default=8),
        conv_width=fields.whole("conv_kernel", default=4),
        chunk=fields.whole("chunk_size", default=256),
        conv_bias=fields.flag("use_conv_bias", default=True),
        proj_bias=bias,
        dt_limit=limit(fields, "time_step_limit"),
        dt_min=fields.number("time_step_min", default=1e-3),
        dt_max=fields.number("time_step_max", default=0.1),
        dt_floor=fields.number("time_step_floor", default=1e-4),
    )
    return ModelConfig(
        family="mamba2",
        layers=(spec,) * fields.layers("num_hidden_layers"),
        norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
        residual_in_fp32=fields.flag("residual_in_fp32", default=True),
        **shared_fields(fields),  # type: ignore[arg-type]
    )


def _write(config: ModelConfig) -> dict[str, object]:
    spec = one_of_kind(config, "M", "mamba2")
    if not isinstance(spec, Mamba2) or set(config.pattern) != {"M"}:
        raise refuse("mamba2", f"the pattern {config.pattern!r}, it has Mamba-2 layers only")
    if spec.d_inner % config.d_model:
        raise refuse("mamba2", f"{spec.n_heads} heads of {spec.head_dim}, which is no multiple of {config.d_model}")
    return write_shared(config) | {
        "num_hidden_layers": len(config.layers),
        "num_heads": spec.n_heads,
        "head_dim": spec.head_dim,
        "state_size": spec.d_state,
        "n_groups": spec.n_groups,
        "conv_kernel": spec.conv_width,
        "chunk_size": spec.chunk,
        "use_conv_bias": spec.conv_bias,
        "use_bias": spec.proj_bias,
        "expand": spec.d_inner // config.d_model,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "rescale_prenorm_residual": False,
        "time_step_min": spec.dt_min,
        "time_step_max": spec.dt_max,
        "time_step_floor": spec.dt_floor,
        **write_limit(spec),
    }


FAMILY = Family(name="mamba2", architecture="Mamba2ForCausalLM", read=_read, write=_write, names=NAMES)
