"""Small models that the tests of this folder share: one of every kind of layer and family."""

from plait.model.config import ModelConfig

MAMBA = {"n_heads": 6, "head_dim": 4, "d_state": 5, "n_groups": 3, "conv_width": 4, "chunk": 8}
ATTENTION = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
ROPE = {"base": 100.0}
MOE = {"n_experts": 5, "n_chosen": 2, "d_ff": 7, "d_shared": 9, "d_latent": 10, "scale": 1.5}


def config(pattern: str, **changed: object) -> ModelConfig:
    """A model of this pattern, 20 wide over 37 tokens; sections can be changed by name."""
    sizes: dict[str, object] = {
        "vocab_size": 37,
        "d_model": 20,
        "mamba2": MAMBA,
        "attention": ATTENTION,
        "mlp": {"d_ff": 24},
        "moe": MOE,
        "init_std": 0.2,
    }
    return ModelConfig.from_pattern(pattern, **(sizes | changed))


FAMILIES = {
    "hybrid": config("M-M*-ME"),
    "mamba": config("MMM", residual_in_fp32=True),
    "llama": config(
        "*-*-", attention=ATTENTION | {"rope": ROPE}, mlp={"d_ff": 24, "activation": "silu", "gated": True}
    ),
    "qwen": config(
        "*-*-", attention=ATTENTION | {"rope": ROPE, "qk_norm": True, "qkv_bias": True}, ties_embeddings=True
    ),
    "partial rope": config("M*-", attention=ATTENTION | {"rope": {"rotated": 0.34}}),
    "biased": config(
        "M-*E", mamba2=MAMBA | {"proj_bias": True}, mlp={"d_ff": 8, "bias": True}, moe=MOE | {"bias": True}
    ),
}
