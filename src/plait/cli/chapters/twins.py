"""The two models of the story: a Nemotron-H style hybrid, and a Transformer with as many parameters.

Both have the same vocabulary, width, attention heads and squared-ReLU layers. The twin has attention with rotary
positions in place of Mamba-2, and a hidden size chosen so that the parameters agree.

Source   NVIDIA 2025, arXiv:2504.03624 (pattern and kinds of layers; the Transformer of its comparison).
"""

from dataclasses import replace

from plait.cli.chapters.story import HYBRID, TWIN, Scale
from plait.model.config import ModelConfig
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.ops.rope import Rope


def hybrid(scale: Scale, vocab_size: int, eos_id: int | None) -> ModelConfig:
    """The hybrid: mostly Mamba-2 and feed-forward layers, a few of attention without positions."""
    d = scale.d_model
    return ModelConfig.from_pattern(
        scale.pattern,
        name=f"demo-{HYBRID}",
        vocab_size=vocab_size,
        d_model=d,
        mamba2=Mamba2(n_heads=2 * d // 32, head_dim=32, d_state=64, n_groups=2, chunk=64),
        attention=Attention(n_heads=d // 32, n_kv_heads=max(1, d // 64), head_dim=32),
        mlp=MLP(d_ff=4 * d),
        ties_embeddings=True,
        max_context=scale.seq_len,
        eos_ids=() if eos_id is None else (eos_id,),
    )


def twin(config: ModelConfig) -> ModelConfig:
    """A Transformer of the same width, depth and heads whose parameters agree within one per cent."""
    attention = next(spec for spec in config.layers if isinstance(spec, Attention))
    attention = replace(attention, rope=Rope(base=10000.0))
    n_blocks = max(1, len(config.layers) // 2)
    wanted = config.cost().params

    def sized(d_ff: int) -> ModelConfig:
        return replace(config, name=f"demo-{TWIN.lower()}", family="", layers=(attention, MLP(d_ff=d_ff)) * n_blocks)

    per_unit = 2 * config.d_model * n_blocks
    d_ff = (wanted - sized(1).cost().params) // per_unit + 1
    # a multiple of eight suits vector units; the error stays far below one per cent
    return sized(max(8, round(d_ff / 8) * 8))
