"""Transformers of blocks of attention and feed-forward: `llama`, `qwen2`, `qwen3`, `bitnet`.

They share names and almost all of the config. What differs: qwen2 has biases on queries, keys and values; qwen3 norms
queries and keys; bitnet is gated squared ReLU with a norm before each output projection, in ternary weights.

Source   the published configs; transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from plait.formats.error import CheckpointError
from plait.formats.families.family import Family, one_of_kind, refuse, shared_fields, write_shared
from plait.formats.families.fields import Fields
from plait.formats.families.rope import read_rope, write_rope
from plait.formats.rules import Names, rule
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mlp import MLP

_L = "model.layers.{n}."
_HEADS = "num_attention_heads, num_key_value_heads, head_dim and hidden_size"
_FF = "intermediate_size and hidden_size"
NAMES = Names(
    rules={
        "": (
            rule("embed.weight", "model.embed_tokens.weight", "vocab_size and hidden_size"),
            rule("norm.weight", "model.norm.weight", "hidden_size"),
            rule("head.weight", "lm_head.weight", "vocab_size and hidden_size"),
        ),
        "*": (
            rule("norm.weight", _L + "input_layernorm.weight", "hidden_size"),
            *(rule(f"mixer.{p}_proj.weight", _L + f"self_attn.{p}_proj.weight", _HEADS) for p in "qkvo"),
            *(rule(f"mixer.{p}_proj.bias", _L + f"self_attn.{p}_proj.bias", _HEADS) for p in "qkvo"),
            *(rule(f"mixer.{p}_norm.weight", _L + f"self_attn.{p}_norm.weight", "head_dim") for p in "qk"),
            rule("mixer.sub_norm.weight", _L + "self_attn.attn_sub_norm.weight", _HEADS),
        ),
        "-": (
            rule("norm.weight", _L + "post_attention_layernorm.weight", "hidden_size"),
            *(rule(f"mixer.{p}_proj.weight", _L + f"mlp.{p}_proj.weight", _FF) for p in ("gate", "up", "down")),
            *(rule(f"mixer.{p}_proj.bias", _L + f"mlp.{p}_proj.bias", _FF) for p in ("gate", "up", "down")),
            rule("mixer.sub_norm.weight", _L + "mlp.ffn_sub_norm.weight", "intermediate_size"),
        ),
    },
    layer=lambda i: i // 2,
    ignored=("*.rotary_emb.inv_freq",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traits:
    """What one of the families fixes; None means that its config decides."""

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    sub_norm: bool = False
    activation: str = "silu"
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    max_context: int = 2048
    mlp_bias: bool | None = False
    windows: bool = False


TRAITS: Mapping[str, _Traits] = {
    "llama": _Traits(mlp_bias=None),
    "qwen2": _Traits(qkv_bias=True, out_bias=False, windows=True, max_context=32768),
    "qwen3": _Traits(qk_norm=True, head_dim=128, windows=True, max_context=32768),
    "bitnet": _Traits(sub_norm=True, activation="relu2", norm_eps=1e-5, rope_base=500000.0),
}


def _read(name: str, fields: Fields) -> ModelConfig:
    traits = TRAITS[name]
    acts = ("silu", "swish") if traits.activation == "silu" else ("relu2",)
    fields.only("hidden_act", *acts, why=f"{name} layers of this kind only")
    if traits.windows:
        _check_windows(fields)
    d_model, n_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    bias = fields.flag("attention_bias", default=False) if traits.qkv_bias is None else False
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", default=n_heads),
        head_dim=fields.whole("head_dim", default=traits.head_dim or max(d_model // n_heads, 1)),
        rope=read_rope(fields, traits.rope_base, traits.max_context),
        qkv_bias=bias if traits.qkv_bias is None else traits.qkv_bias,
        out_bias=bias if traits.out_bias is None else traits.out_bias,
        qk_norm=traits.qk_norm,
        sub_norm=traits.sub_norm,
    )
    mlp = MLP(
        d_ff=fields.whole("intermediate_size"),
        activation="relu2" if traits.activation == "relu2" else "silu",
        gated=True,
        bias=fields.flag("mlp_bias", default=False) if traits.mlp_bias is None else False,
        sub_norm=traits.sub_norm,
    )
    return ModelConfig(
        family=name,
        layers=(attention, mlp) * fields.layers("num_hidden_layers"),
        norm_eps=fields.number("rms_norm_eps", default=traits.norm_eps),
        max_context=fields.whole("max_position_embeddings", default=traits.max_context),
        recipe=_ternary(fields) if name == "bitnet" else "bf16",
        **shared_fields(fields),  # type: ignore[arg-type]
    )


def _ternary(fields: Fields) -> str:
    """The recipe of a bitnet: packed weights, which its own readers take for granted, or masters."""
    table = fields.table("quantization_config")
    packed = table is not None and table.value("quantization_mode") in (None, "offline")
    return "ternary-packed" if packed else "ternary"


def _check_windows(fields: Fields) -> None:
    """Some layers of a Qwen may see a window only; no published one uses it."""
    kinds = fields.value("layer_types")
    used = isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)
    if fields.flag("use_sliding_window", default=False) and kinds is None:
        first = fields.whole("max_window_layers", default=28, least=0)
        used = fields.has("sliding_window") and first < fields.layers("num_hidden_layers")
    if used:
        raise CheckpointError(f"{fields.path}: sliding-window attention is in use, which is not supported")


def _write(name: str, config: ModelConfig) -> dict[str, object]:
    traits = TRAITS[name]
    n_blocks, rest = divmod(len(config.layers), 2)
    if rest or config.pattern != "*-" * n_blocks:
        raise refuse(name, f"the pattern {config.pattern!r}, it has blocks of attention and feed-forward only")
    a, m = one_of_kind(config, "*", name), one_of_kind(config, "-", name)
    assert isinstance(a, Attention) and isinstance(m, MLP)
    _check(name, config, a, m)
    out = write_shared(config) | {
        "num_hidden_layers": n_blocks,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.n_kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": m.d_ff,
        "hidden_act": m.activation,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "attention_dropout": 0.0,
        **write_rope(a.rope, name),
    }
    if traits.qkv_bias is None:
        out["attention_bias"] = a.qkv_bias
    if traits.mlp_bias is None:
        out["mlp_bias"] = m.bias
    if traits.windows:
        out |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": n_blocks}
    if name == "bitnet":
        out["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline" if config.recipe == "ternary-packed" else "online",
        }
    return out


def _check(name: str, config: ModelConfig, a: Attention, m: MLP) -> None:
    traits = TRAITS[name]
    free = traits.qkv_bias is None
    for what, wrong in (
        ("attention without rotary positions", a.rope is None),
        (f"qkv_bias={a.qkv_bias} with out_bias={a.out_bias}", a.qkv_bias != a.out_bias if free else not a.qkv_bias),
        (f"out_bias={a.out_bias}", not free and a.out_bias),
        (f"qk_norm={a.qk_norm}", a.qk_norm != traits.qk_norm),
        ("sub-norms" if not traits.sub_norm else "layers without sub-norms", a.sub_norm != traits.sub_norm),
        (f"a feed-forward layer with sub_norm={m.sub_norm}", m.sub_norm != traits.sub_norm),
        ("an ungated feed-forward layer", not m.gated),
        (f"activation={m.activation!r}", m.activation != traits.activation),
        ("biases in feed-forward layers", m.bias and traits.mlp_bias is not None),
        ("a residual stream in float32", config.residual_in_fp32),
        # their readers divide the width by the heads, whatever head_dim says
        (f"{a.n_heads} heads in a width of {config.d_model}", name != "qwen3" and config.d_model % a.n_heads != 0),
        (
            f"head_dim={a.head_dim}, which is not hidden_size / heads",
            name in ("qwen2", "bitnet") and a.head_dim * a.n_heads != config.d_model,
        ),
    ):
        if wrong:
            raise refuse(name, what)


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name, architecture=architecture, read=partial(_read, name), write=partial(_write, name), names=NAMES
    )


LLAMA = _family("llama", "LlamaForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
QWEN3 = _family("qwen3", "Qwen3ForCausalLM")
BITNET = _family("bitnet", "BitNetForCausalLM")
