"""The published models by name: exact sizes, from their papers and released configs, as settings of `ModelConfig`.

Source   NVIDIA 2025, arXiv:2504.03624 (Nemotron-H), arXiv:2508.14444 (Nano 2), arXiv:2512.20848 (Nemotron 3 Nano);
         Waleffe et al. 2024, arXiv:2406.07887 (Mamba-2 8B); Dao and Gu 2024, arXiv:2405.21060 (Mamba-2 2.7B);
         Ma et al. 2025, arXiv:2504.12285 (BitNet); the released configs of Llama 3.1, Qwen 2.5 and Qwen 3.
"""

Settings = dict[str, object]

H8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H56B = "M-M-M-M" + "*-M-M-M-M-M" * 9 + "*-M-M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B = "M-M-M-M" + "*-M-M-M-M" * 5 + "*-M-M-M-M-"
NANO_3_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _nemotron(
    pattern: str,
    d_model: int,
    heads: tuple[int, int],
    mamba: tuple[int, int, int],
    feed_forward: Settings,
    max_context: int = 8192,
) -> Settings:
    """A Nemotron: heads are (query, key/value), mamba is (heads, head size, state size)."""
    return {
        "vocab_size": 131072,
        "d_model": d_model,
        "pattern": pattern,
        "mamba2": {"n_heads": mamba[0], "head_dim": mamba[1], "d_state": mamba[2]},
        "attention": {"n_heads": heads[0], "n_kv_heads": heads[1]},
        "moe" if "n_experts" in feed_forward else "mlp": feed_forward,
        "max_context": max_context,
        # every published standard deviation is this function of the width
        "init_std": (0.8 / d_model) ** 0.5,
        "bos_id": 1,
        "eos_ids": [2],
        "pad_id": 0,
    }


def _transformer(n_blocks: int, d_model: int, vocab_size: int, attention: Settings, mlp: Settings) -> Settings:
    """Blocks of attention and feed-forward; n_blocks is what published configs call layers."""
    return {
        "pattern": "*-" * n_blocks,
        "d_model": d_model,
        "vocab_size": vocab_size,
        "attention": attention,
        "mlp": mlp,
    }


def _swiglu(d_ff: int) -> Settings:
    return {"d_ff": d_ff, "activation": "silu", "gated": True}


def _llama(n_blocks: int, d_model: int, n_heads: int, d_ff: int) -> Settings:
    rope = {"base": 5e5, "scaling": "llama3", "stretch": 8.0, "original_context": 8192, "low": 1.0, "high": 4.0}
    attention: Settings = {"n_heads": n_heads, "n_kv_heads": 8, "rope": rope}
    ids = {"bos_id": 128000, "eos_ids": [128001]}
    sizes = _transformer(n_blocks, d_model, 128256, attention, _swiglu(d_ff))
    return sizes | ids | {"family": "llama", "max_context": 131072}


def _qwen2(n_blocks: int, d_model: int, heads: tuple[int, int], d_ff: int, norm_eps: float) -> Settings:
    attention: Settings = {"n_heads": heads[0], "n_kv_heads": heads[1], "rope": {"base": 1e6}, "qkv_bias": True}
    ids = {"bos_id": 151643, "eos_ids": [151643]}
    sizes = _transformer(n_blocks, d_model, 152064, attention, _swiglu(d_ff))
    return sizes | ids | {"family": "qwen2", "norm_eps": norm_eps, "max_context": 131072}


def _mamba2(n_layers: int, d_model: int, vocab_size: int, n_groups: int) -> Settings:
    return {
        "family": "mamba2",
        "pattern": "M" * n_layers,
        "d_model": d_model,
        "vocab_size": vocab_size,
        "mamba2": {"n_heads": d_model // 32, "n_groups": n_groups, "chunk": 256},
        "residual_in_fp32": True,
    }


_PRESETS: dict[str, Settings] = {
    "nemotron-h-4b": _nemotron(H8B, 3072, (32, 8), (112, 64, 128), {"d_ff": 12288}),
    "nemotron-h-8b": _nemotron(H8B, 4096, (32, 8), (128, 64, 128), {"d_ff": 21504}),
    "nemotron-h-47b": _nemotron(H47B, 8192, (64, 8), (256, 64, 256), {"d_ff": 30720}),
    "nemotron-h-56b": _nemotron(H56B, 8192, (64, 8), (256, 64, 256), {"d_ff": 32768}),
    "nemotron-nano-9b-v2": _nemotron(NANO_9B, 4480, (40, 8), (128, 80, 128), {"d_ff": 15680}, 131072),
    "nemotron-nano-12b-v2": _nemotron(NANO_12B, 5120, (40, 8), (128, 80, 128), {"d_ff": 20480}, 131072),
    "nemotron-3-nano-30b-a3b": _nemotron(
        NANO_3_30B,
        2688,
        (32, 2),
        (64, 64, 128),
        {"n_experts": 128, "n_chosen": 6, "d_ff": 1856, "d_shared": 3712, "scale": 2.5},
        262144,
    ),
    # the Transformer trained on Nemotron-H-8B's tokens
    "nemotron-t-8b": _transformer(32, 4096, 131072, {"n_heads": 32, "n_kv_heads": 8, "rope": {}}, {"d_ff": 21504})
    | {"family": "", "init_std": (0.8 / 4096) ** 0.5, "bos_id": 1, "eos_ids": [2], "pad_id": 0},
    "bitnet-2b4t": _transformer(
        30,
        2560,
        128256,
        {"n_heads": 20, "n_kv_heads": 5, "rope": {"base": 5e5}, "sub_norm": True},
        {"d_ff": 6912, "gated": True, "sub_norm": True},
    )
    | {"family": "bitnet", "ties_embeddings": True, "recipe": "ternary", "max_context": 4096}
    | {"bos_id": 128000, "eos_ids": [128001]},
    "mamba2-2.7b": _mamba2(64, 2560, 50288, 1) | {"ties_embeddings": True, "max_context": 2048},
    "mamba2-8b": _mamba2(56, 4096, 256000, 8),
    "llama-3.1-8b": _llama(32, 4096, 32, 14336),
    "llama-3.1-70b": _llama(80, 8192, 64, 28672),
    "qwen2.5-7b": _qwen2(28, 3584, (28, 4), 18944, 1e-6),
    "qwen2.5-72b": _qwen2(80, 8192, (64, 8), 29568, 1e-5),
    "qwen3-8b": _transformer(
        36, 4096, 151936, {"n_heads": 32, "n_kv_heads": 8, "rope": {"base": 1e6}, "qk_norm": True}, _swiglu(12288)
    )
    | {"family": "qwen3", "norm_eps": 1e-6, "max_context": 40960, "bos_id": 151643, "eos_ids": [151645]},
}
PRESETS = {name: {"name": name} | settings for name, settings in _PRESETS.items()}
