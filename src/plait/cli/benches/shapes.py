"""The models that are measured: their sizes, and what one token costs them in FLOPs and bytes.

    matrix FLOPs of a prompt of T tokens = 2 T (numbers of all matrices but embedding and head)
                                         + 2 (numbers of the head): the last position only
                                         + T (T + 1) / 2 x (FLOPs per token and key)

The recurrence of Mamba-2 and its convolution are work too, but not counted here: only what no implementation can avoid.

Source   the configurations of Nemotron-H and Llama, scaled down (arXiv:2504.03624 table 1).
"""

from dataclasses import replace

from plait.config import ConfigError, nearest
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.model.presets import PRESETS

HYBRID_45M = ModelConfig.from_pattern(
    "M-M-M-M*-M-M-M-",
    name="hybrid-45m",
    vocab_size=16384,
    d_model=512,
    mamba2={"n_heads": 16, "head_dim": 64, "d_state": 64, "n_groups": 4, "chunk": 128},
    attention={"n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
    mlp={"d_ff": 2048},
)
HYBRID_290M = ModelConfig.from_pattern(
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-",
    name="hybrid-290m",
    vocab_size=32768,
    d_model=1024,
    mamba2={"n_heads": 32, "head_dim": 64, "d_state": 128, "n_groups": 8, "chunk": 128},
    attention={"n_heads": 16, "n_kv_heads": 4, "head_dim": 64},
    mlp={"d_ff": 4096},
)
TWIN_284M = ModelConfig.from_pattern(
    "*-" * 18,
    name="llama-284m",
    family="llama",
    vocab_size=32768,
    d_model=1024,
    attention={"n_heads": 16, "n_kv_heads": 4, "head_dim": 64, "rope": {"base": 10000.0}},
    mlp={"d_ff": 3072, "activation": "silu", "gated": True},
)
# BitNet b1.58 2B4T with a quarter of its vocabulary
BITNET_2B = ModelConfig.from_pattern(
    "*-" * 30,
    name="bitnet-2b",
    family="bitnet",
    recipe="ternary",
    vocab_size=32768,
    d_model=2560,
    ties_embeddings=True,
    attention={"n_heads": 20, "n_kv_heads": 5, "head_dim": 128, "rope": {"base": 500000.0}, "sub_norm": True},
    mlp={"d_ff": 6912, "gated": True, "sub_norm": True},
    norm_eps=1e-5,
)
MODELS = {"45m": HYBRID_45M, "290m": HYBRID_290M, "twin": TWIN_284M, "2b4t": BITNET_2B}


def config_of(name: str) -> ModelConfig:
    """The sizes of a model by name: one of MODELS, a published preset, or the folder of a checkpoint.

    Raises: ConfigError naming the nearest one for an unknown name.
    """
    if name in MODELS:
        return MODELS[name]
    if name in PRESETS:
        return ModelConfig.preset(name)
    if "/" in name:
        return Checkpoint.open(name).config
    near = nearest(name, [*MODELS, *PRESETS])
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(MODELS)}, the presets, or ./FOLDER"
    raise ConfigError(f"model={name!r} is unknown; {hint}")


def as_llama(config: ModelConfig) -> ModelConfig:
    """A BitNet as llama.cpp can run it: SiLU for squared ReLU, no sub-norms; other models as they are."""
    if config.family != "bitnet":
        return config
    layers = tuple(
        replace(spec, sub_norm=False, activation="silu") if isinstance(spec, MLP) else replace(spec, sub_norm=False)  # type: ignore[call-arg]
        for spec in config.layers
    )
    return replace(config, family="llama", layers=layers)


def matrix_numbers(config: ModelConfig) -> int:
    """Numbers of the matrices that one token is multiplied with, without embedding and head."""
    total = 0
    for spec in config.layers:
        if isinstance(spec, Mamba2):
            total += config.d_model * (spec.d_in_proj + spec.d_inner)
        elif isinstance(spec, MLP | MoE):
            total += _of_feed_forward(spec, config.d_model)
        else:
            wide, narrow = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim  # type: ignore[attr-defined]
            total += config.d_model * 2 * (wide + narrow)
    return total


def _of_feed_forward(spec: MLP | MoE, d_model: int) -> int:
    if isinstance(spec, MLP):
        return (3 if spec.gated else 2) * d_model * spec.d_ff
    return 2 * d_model * (spec.n_chosen * spec.d_ff + spec.d_shared) + d_model * spec.n_experts


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Matrix FLOPs that a prompt needs; the head for its last position only."""
    seen = tokens * (tokens + 1) / 2
    head = config.vocab_size * config.d_model
    return 2 * matrix_numbers(config) * tokens + 2 * head + config.cost().flops_per_token_per_key * seen


def parameter_flops(config: ModelConfig, tokens: int) -> float:
    """The common estimate: two FLOPs per token and parameter, all but the input embedding, head at every position."""
    table = 0 if config.ties_embeddings else config.vocab_size * config.d_model
    return 2.0 * tokens * (config.cost().active_params - table)


def weight_bytes(model: Hybrid) -> int:
    """Bytes of weights that decoding one token reads: all that is stored but the input embedding."""
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    table = model.embed.weight
    return held - (0 if model.head is None else table.numel() * table.element_size())


def layer_bytes(model: Hybrid) -> int:
    """Bytes of all weights but embedding and head."""
    held = {id(t): t for t in (*model.blocks.parameters(), *model.blocks.buffers(), *model.norm.parameters())}
    return sum(t.numel() * t.element_size() for t in held.values())


def cache_bytes(config: ModelConfig, tokens: int, batch: int = 1, element_bytes: int = 2) -> int:
    """Bytes of state and KV that decoding one token reads, `tokens` after the beginning; the states in float32."""
    cost = config.cost()
    kv = tokens * cost.kv_numbers_per_token * element_bytes
    return batch * (kv + 4 * cost.ssm_numbers + element_bytes * cost.conv_numbers)
