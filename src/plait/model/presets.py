"""The published models by name: exact sizes, from their papers and released configs.

Source   NVIDIA 2025, arXiv:2504.03624 (Nemotron-H), arXiv:2508.14444 (Nano 2), arXiv:2512.20848 (Nemotron 3 Nano);
         Waleffe et al. 2024, arXiv:2406.07887 (Mamba-2 8B); Dao and Gu 2024, arXiv:2405.21060 (Mamba-2 2.7B);
         Ma et al. 2025, arXiv:2504.12285 (BitNet); the released configs of Llama 3.1, Qwen 2.5 and Qwen 3.
"""

from collections.abc import Callable
from functools import partial

from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.ops.rope import Rope

H8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H56B = "M-M-M-M" + "*-M-M-M-M-M" * 9 + "*-M-M-M-M-M-"
NANO_12B = "M-M-M-M" + "*-M-M-M-M" * 5 + "*-M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_3_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _nemotron(
    name: str,
    pattern: str,
    d_model: int,
    *,
    d_ff: int,
    heads: tuple[int, int],
    mamba: tuple[int, int, int],
    max_context: int = 8192,
) -> ModelConfig:
    """A dense Nemotron-H: heads are (query, key/value), mamba is (heads, head size, state size)."""
    return ModelConfig.from_pattern(
        pattern,
        name=name,
        vocab_size=131072,
        d_model=d_model,
        mamba2=Mamba2(n_heads=mamba[0], head_dim=mamba[1], d_state=mamba[2]),
        attention=Attention(n_heads=heads[0], n_kv_heads=heads[1]),
        mlp=MLP(d_ff=d_ff),
        max_context=max_context,
        init_std=(0.8 / d_model) ** 0.5,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )


def _nemotron_3_nano() -> ModelConfig:
    return ModelConfig.from_pattern(
        NANO_3_30B,
        name="nemotron-3-nano-30b-a3b",
        vocab_size=131072,
        d_model=2688,
        mamba2=Mamba2(n_heads=64, head_dim=64, d_state=128),
        attention=Attention(n_heads=32, n_kv_heads=2),
        moe=MoE(n_experts=128, n_chosen=6, d_ff=1856, d_shared=3712, scale=2.5),
        max_context=262144,
        init_std=(0.8 / 2688) ** 0.5,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )


def _transformer(
    name: str,
    family: str,
    n_layers: int,
    d_model: int,
    vocab_size: int,
    *,
    attention: Attention,
    mlp: MLP,
    **rest: object,
) -> ModelConfig:
    """Blocks of attention and feed-forward; n_layers counts blocks, as the published configs do."""
    return ModelConfig.from_pattern(
        "*-" * n_layers,
        name=name,
        family=family,
        d_model=d_model,
        vocab_size=vocab_size,
        attention=attention,
        mlp=mlp,
        **rest,
    )


def _llama(name: str, n_layers: int, d_model: int, n_heads: int, d_ff: int) -> ModelConfig:
    rope = Rope(base=500000.0, scaling="llama3", stretch=8.0, original_context=8192, low=1.0, high=4.0)
    return _transformer(
        name,
        "llama",
        n_layers,
        d_model,
        128256,
        attention=Attention(n_heads=n_heads, n_kv_heads=8, rope=rope),
        mlp=MLP(d_ff=d_ff, activation="silu", gated=True),
        max_context=131072,
        bos_id=128000,
        eos_ids=(128001,),
    )


def _qwen2(name: str, n_layers: int, d_model: int, heads: tuple[int, int], d_ff: int, vocab: int) -> ModelConfig:
    return _transformer(
        name,
        "qwen2",
        n_layers,
        d_model,
        vocab,
        attention=Attention(n_heads=heads[0], n_kv_heads=heads[1], rope=Rope(base=1e6), qkv_bias=True),
        mlp=MLP(d_ff=d_ff, activation="silu", gated=True),
        norm_eps=1e-6 if d_model == 3584 else 1e-5,
        max_context=131072,
        bos_id=151643,
        eos_ids=(151643,),
    )


def _qwen3() -> ModelConfig:
    return _transformer(
        "qwen3-8b",
        "qwen3",
        36,
        4096,
        151936,
        attention=Attention(n_heads=32, n_kv_heads=8, rope=Rope(base=1e6), qk_norm=True),
        mlp=MLP(d_ff=12288, activation="silu", gated=True),
        norm_eps=1e-6,
        max_context=40960,
        bos_id=151643,
        eos_ids=(151645,),
    )


def _bitnet() -> ModelConfig:
    return _transformer(
        "bitnet-2b4t",
        "bitnet",
        30,
        2560,
        128256,
        attention=Attention(n_heads=20, n_kv_heads=5, rope=Rope(base=500000.0), sub_norm=True),
        mlp=MLP(d_ff=6912, activation="relu2", gated=True, sub_norm=True),
        ties_embeddings=True,
        recipe="ternary",
        max_context=4096,
        bos_id=128000,
        eos_ids=(128001,),
    )


def _mamba2(name: str, n_layers: int, d_model: int, vocab: int, groups: int, ties: bool) -> ModelConfig:
    return ModelConfig.from_pattern(
        "M" * n_layers,
        name=name,
        family="mamba2",
        d_model=d_model,
        vocab_size=vocab,
        mamba2=Mamba2(n_heads=2 * d_model // 64, d_state=128, n_groups=groups, chunk=256),
        ties_embeddings=ties,
        residual_in_fp32=True,
        max_context=8192 if groups > 1 else 2048,
        init_std=0.02,
    )


def _nemotron_t() -> ModelConfig:
    """Nemotron-T-8B, the Transformer trained on Nemotron-H-8B's tokens: 32 blocks with positions."""
    return _transformer(
        "nemotron-t-8b",
        "",
        32,
        4096,
        131072,
        attention=Attention(n_heads=32, n_kv_heads=8, rope=Rope(base=10000.0)),
        mlp=MLP(d_ff=21504),
        init_std=(0.8 / 4096) ** 0.5,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "nemotron-h-4b": partial(_nemotron, "nemotron-h-4b", H8B, 3072, d_ff=12288, heads=(32, 8), mamba=(112, 64, 128)),
    "nemotron-h-8b": partial(_nemotron, "nemotron-h-8b", H8B, 4096, d_ff=21504, heads=(32, 8), mamba=(128, 64, 128)),
    "nemotron-h-47b": partial(_nemotron, "nemotron-h-47b", H47B, 8192, d_ff=30720, heads=(64, 8), mamba=(256, 64, 256)),
    "nemotron-h-56b": partial(_nemotron, "nemotron-h-56b", H56B, 8192, d_ff=32768, heads=(64, 8), mamba=(256, 64, 256)),
    "nemotron-nano-9b-v2": partial(
        _nemotron,
        "nemotron-nano-9b-v2",
        NANO_9B,
        4480,
        d_ff=15680,
        heads=(40, 8),
        mamba=(128, 80, 128),
        max_context=131072,
    ),
    "nemotron-nano-12b-v2": partial(
        _nemotron,
        "nemotron-nano-12b-v2",
        NANO_12B,
        5120,
        d_ff=20480,
        heads=(40, 8),
        mamba=(128, 80, 128),
        max_context=131072,
    ),
    "nemotron-3-nano-30b-a3b": _nemotron_3_nano,
    "nemotron-t-8b": _nemotron_t,
    "bitnet-2b4t": _bitnet,
    "mamba2-2.7b": partial(_mamba2, "mamba2-2.7b", 64, 2560, 50288, 1, True),
    "mamba2-8b": partial(_mamba2, "mamba2-8b", 56, 4096, 256000, 8, False),
    "llama-3.1-8b": partial(_llama, "llama-3.1-8b", 32, 4096, 32, 14336),
    "llama-3.1-70b": partial(_llama, "llama-3.1-70b", 80, 8192, 64, 28672),
    "qwen2.5-7b": partial(_qwen2, "qwen2.5-7b", 28, 3584, (28, 4), 18944, 152064),
    "qwen2.5-72b": partial(_qwen2, "qwen2.5-72b", 80, 8192, (64, 8), 29568, 152064),
    "qwen3-8b": _qwen3,
}
