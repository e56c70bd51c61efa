"""Nemotron-H hybrids: `nemotron_h`, in the four spellings of its config.json that are found in the wild.

pattern  `hybrid_override_pattern` "M-M*-..."            H-4B to 56B, Nano 2
blocks   `layers_block_type` of mamba, attention, mlp, moe  Nemotron 3
old      `mamba_n_groups`, `mamba_d_conv`, ...           hand-written ones
native   `layers_block_type` of linear_attention, ...     transformers 5

The pattern is what we write: every reader takes it.

Source   the published configs; transformers 5.23 and NVIDIA's own model code, where they agree.
"""

from plait.formats.error import CheckpointError
from plait.formats.families.family import Family, one_of_kind, refuse, shared_fields, write_shared
from plait.formats.families.fields import Fields
from plait.formats.families.mamba2 import LAYER, MAMBA2, NORM, OUTSIDE, SPELLINGS, limit, write_limit
from plait.formats.rules import Names, rule
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE

WORDS = {
    "mamba": "M",
    "mamba2": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}

_M = LAYER + "mixer."
_HEADS = "num_attention_heads, num_key_value_heads, head_dim and hidden_size"
ATTENTION = (
    NORM,
    *(rule(f"mixer.{p}_proj.weight", _M + f"{p}_proj.weight", _HEADS) for p in "qkvo"),
    *(rule(f"mixer.{p}_proj.bias", _M + f"{p}_proj.bias", "attention_bias") for p in "qkvo"),
)
_FF = "intermediate_size and hidden_size"
DENSE = (
    NORM,
    *(rule(f"mixer.{p}_proj.weight", _M + f"{p}_proj.weight", _FF) for p in ("up", "down")),
    *(rule(f"mixer.{p}_proj.bias", _M + f"{p}_proj.bias", "mlp_bias") for p in ("up", "down")),
)
_EXPERT = "n_routed_experts, moe_intermediate_size, moe_latent_size and hidden_size"
_SHARED = "moe_shared_expert_intermediate_size and hidden_size"
EXPERTS = (
    NORM,
    rule("mixer.router.weight", _M + "gate.weight", "n_routed_experts and hidden_size"),
    rule("mixer.router.correction", _M + "gate.e_score_correction_bias", "n_routed_experts"),
    rule("mixer.experts.up", _M + "experts.{j}.up_proj.weight", _EXPERT, stacked=True),
    rule("mixer.experts.down", _M + "experts.{j}.down_proj.weight", _EXPERT, stacked=True),
    *(rule(f"mixer.shared.{p}_proj.weight", _M + f"shared_experts.{p}_proj.weight", _SHARED) for p in ("up", "down")),
    *(rule(f"mixer.shared.{p}_proj.bias", _M + f"shared_experts.{p}_proj.bias", "mlp_bias") for p in ("up", "down")),
    *(rule(f"mixer.latent_in.{w}", _M + f"fc1_latent_proj.{w}", "moe_latent_size") for w in ("weight", "bias")),
    *(rule(f"mixer.latent_out.{w}", _M + f"fc2_latent_proj.{w}", "moe_latent_size") for w in ("weight", "bias")),
)
NAMES = Names(
    rules={"": OUTSIDE, "M": MAMBA2, "*": ATTENTION, "-": DENSE, "E": EXPERTS},
    spellings=(*SPELLINGS, (r"\.gate\.e_score_correction\.bias$", ".gate.e_score_correction_bias")),
    # blocks that predict further tokens; the trunk does not need them
    ignored=("mtp.*",),
)


# fields of one kind of layer, which are right ones in the config of a model without such layers too
_OF_KINDS = (
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "mamba_n_groups", "conv_kernel"),
    *("mamba_d_conv", "chunk_size", "mamba_chunk_size", "use_conv_bias", "mamba_conv_bias", "use_bias"),
    *("time_step_limit", "mamba_dt_limit", "time_step_min", "mamba_dt_min", "time_step_max", "mamba_dt_max"),
    *("time_step_floor", "mamba_dt_init_floor"),
    *("num_attention_heads", "attention_bias", "num_key_value_heads", "head_dim", "attention_head_dim"),
    *("intermediate_size", "mlp_bias"),
    *("n_shared_experts", "moe_shared_expert_intermediate_size", "moe_latent_size", "n_routed_experts"),
    *("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor"),
)


def _read(fields: Fields) -> ModelConfig:
    fields.know(*_OF_KINDS)
    pattern = _pattern(fields)
    fields.only("mamba_hidden_act", "silu", "swish", why="the convolution is followed by SiLU")
    fields.only("mlp_hidden_act", "relu2", why="feed-forward layers are squared ReLU")
    fields.only("sliding_window", why="attention sees the whole context")
    shared = shared_fields(fields)
    kinds: dict[str, LayerSpec] = {}
    if "M" in pattern:
        kinds["M"] = _mamba2(fields)
    if "*" in pattern:
        kinds["*"] = _attention(fields)
    if "E" in pattern:
        kinds["E"] = _experts(fields)
    widths = iter(_widths(fields, pattern) if "-" in pattern else [])
    bias = fields.flag("mlp_bias", default=False)
    return ModelConfig(
        family="nemotron_h",
        layers=tuple(MLP(d_ff=next(widths), bias=bias) if kind == "-" else kinds[kind] for kind in pattern),
        norm_eps=fields.number("layer_norm_epsilon", "rms_norm_eps", "norm_eps", default=1e-5),
        residual_in_fp32=fields.flag("residual_in_fp32", default=False),
        max_context=fields.whole("max_position_embeddings", default=4096),
        **shared,  # type: ignore[arg-type]
    )


def _pattern(fields: Fields) -> str:
    """One letter per layer; where both spellings are there, the list counts."""
    words, letters = fields.value("layers_block_type", "layer_types"), fields.value("hybrid_override_pattern")
    if words is None and letters is None:
        raise CheckpointError(
            f"{fields.path}: neither hybrid_override_pattern nor layers_block_type says what the layers are"
        )
    if words is not None:
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise fields.wrong("layers_block_type", words, "a list of words")
        for i, word in enumerate(words):
            if word not in WORDS:
                raise CheckpointError(
                    f"{fields.path}: layers_block_type[{i}] = {word!r} is unknown; known: {', '.join(WORDS)}"
                )
        pattern = "".join(WORDS[word] for word in words)
    else:
        if not isinstance(letters, str):
            raise fields.wrong("hybrid_override_pattern", letters, "one letter per layer")
        # Megatron marks pipeline stages by | and hangs the extra predictors behind a /
        pattern = letters.split("/")[0].replace("|", "")
        for i, letter in enumerate(pattern):
            if letter not in "M*-E":
                raise CheckpointError(
                    f"{fields.path}: hybrid_override_pattern has an unknown layer letter {letter!r} at position {i}; "
                    "known: M Mamba-2, * attention, - MLP, E experts"
                )
        n_layers = fields.whole("num_hidden_layers", default=len(pattern), least=0)
        if n_layers != len(pattern):
            raise CheckpointError(
                f"{fields.path}: num_hidden_layers = {n_layers}, but hybrid_override_pattern has {len(pattern)} letters"
            )
    if not pattern:
        raise CheckpointError(f"{fields.path}: the pattern of layers is empty")
    return pattern


def _widths(fields: Fields, pattern: str) -> list[int]:
    """Feed-forward width of each MLP layer; a list has one entry per MLP layer, or one per layer."""
    value = fields.value("intermediate_size")
    if not isinstance(value, list):
        return [fields.whole("intermediate_size")] * pattern.count("-")
    if len(value) == len(pattern):
        value = [width for width, kind in zip(value, pattern, strict=True) if kind == "-"]
    if len(value) != pattern.count("-") or not all(type(width) is int and width > 0 for width in value):
        raise fields.wrong("intermediate_size", value, f"a width, or a list of {pattern.count('-')} widths")
    return value


def _mamba2(fields: Fields) -> Mamba2:
    return Mamba2(
        n_heads=fields.whole("mamba_num_heads", default=128),
        head_dim=fields.whole("mamba_head_dim", default=64),
        d_state=fields.whole("ssm_state_size", default=128),
        n_groups=fields.whole("n_groups", "mamba_n_groups", default=8),
        conv_width=fields.whole("conv_kernel", "mamba_d_conv", default=4),
        chunk=fields.whole("chunk_size", "mamba_chunk_size", default=128),
        conv_bias=fields.flag("use_conv_bias", "mamba_conv_bias", default=True),
        proj_bias=fields.flag("use_bias", default=False),
        dt_limit=limit(fields, "time_step_limit", "mamba_dt_limit"),
        dt_min=fields.number("time_step_min", "mamba_dt_min", default=1e-3),
        dt_max=fields.number("time_step_max", "mamba_dt_max", default=0.1),
        dt_floor=fields.number("time_step_floor", "mamba_dt_init_floor", default=1e-4),
    )


def _attention(fields: Fields) -> Attention:
    n_heads = fields.whole("num_attention_heads")
    bias = fields.flag("attention_bias", default=False)
    return Attention(
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", default=n_heads),
        head_dim=fields.whole("head_dim", "attention_head_dim", default=max(fields.whole("hidden_size") // n_heads, 1)),
        qkv_bias=bias,
        out_bias=bias,
    )


def _experts(fields: Fields) -> MoE:
    n_shared = fields.whole("n_shared_experts", default=1, least=0)
    if n_shared > 1:
        raise CheckpointError(
            f"{fields.path}: n_shared_experts = {n_shared} is read differently by different programs; known: 0 or 1"
        )
    width = fields.whole("moe_shared_expert_intermediate_size", default=1 if n_shared == 0 else None, least=0)
    latent = fields.value("moe_latent_size")
    return MoE(
        n_experts=fields.whole("n_routed_experts", "num_local_experts"),
        n_chosen=fields.whole("num_experts_per_tok"),
        d_ff=fields.whole("moe_intermediate_size"),
        d_shared=width * n_shared,
        d_latent=None if latent is None else fields.whole("moe_latent_size"),
        n_groups=fields.whole("n_group", default=1),
        n_top_groups=fields.whole("topk_group", default=1),
        normalises=fields.flag("norm_topk_prob", default=True),
        scale=fields.number("routed_scaling_factor", default=1.0),
        bias=fields.flag("mlp_bias", default=False),
    )


def _write(config: ModelConfig) -> dict[str, object]:
    mamba, heads, mlp, moe = (one_of_kind(config, symbol, "nemotron_h") for symbol in "M*-E")
    biases = {spec.bias for spec in (mlp, moe) if isinstance(spec, MLP | MoE)}
    if len(biases) > 1:
        raise refuse("nemotron_h", "biases in MLP layers but not in expert layers, or the reverse")
    out = write_shared(config) | {
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": len(config.layers),
        "layer_norm_epsilon": config.norm_eps,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "residual_in_fp32": config.residual_in_fp32,
        "rescale_prenorm_residual": True,
        "mlp_hidden_act": "relu2",
        "mlp_bias": biases == {True},
        "use_mamba_kernels": True,
        "num_logits_to_keep": 1,
    }
    if isinstance(mamba, Mamba2):
        out |= _write_mamba2(mamba, config.d_model)
    if isinstance(heads, Attention):
        out |= _write_attention(heads)
    if isinstance(mlp, MLP):
        if mlp.gated or mlp.sub_norm or mlp.activation != "relu2":
            raise refuse("nemotron_h", "a gated or normalised feed-forward layer")
        out["intermediate_size"] = mlp.d_ff
    if isinstance(moe, MoE):
        out |= _write_experts(moe)
    return out


def _write_mamba2(s: Mamba2, d_model: int) -> dict[str, object]:
    return {
        "mamba_num_heads": s.n_heads,
        "mamba_head_dim": s.head_dim,
        "ssm_state_size": s.d_state,
        "n_groups": s.n_groups,
        "conv_kernel": s.conv_width,
        "chunk_size": s.chunk,
        "use_conv_bias": s.conv_bias,
        "use_bias": s.proj_bias,
        "mamba_proj_bias": s.proj_bias,
        "mamba_hidden_act": "silu",
        # widths follow from heads; this is for information
        "expand": max(round(s.d_inner / d_model), 1),
        "time_step_min": s.dt_min,
        "time_step_max": s.dt_max,
        "time_step_floor": s.dt_floor,
        **write_limit(s),
    }


def _write_attention(s: Attention) -> dict[str, object]:
    for what, wrong in (
        ("rotary positions", s.rope is not None),
        ("norms of queries and keys", s.qk_norm),
        ("a norm before the output projection", s.sub_norm),
        ("biases in attention that its readers would use", s.qkv_bias or s.out_bias),
    ):
        if wrong:
            raise refuse("nemotron_h", what)
    return {
        "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_kv_heads,
        "head_dim": s.head_dim,
        "attention_head_dim": s.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
    }


def _write_experts(s: MoE) -> dict[str, object]:
    if not s.d_shared:
        raise refuse("nemotron_h", "expert layers without a shared expert")
    return {
        "n_routed_experts": s.n_experts,
        "num_experts_per_tok": s.n_chosen,
        "moe_intermediate_size": s.d_ff,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": s.d_shared,
        "moe_latent_size": s.d_latent,
        "n_group": s.n_groups,
        "topk_group": s.n_top_groups,
        "norm_topk_prob": s.normalises,
        "routed_scaling_factor": s.scale,
    }


FAMILY = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    read=_read,
    write=_write,
    names=NAMES,
    copies_tied_head=True,
)
