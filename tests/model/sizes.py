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


# methods of training stability, each as changes of the sections; names as in arXiv:2410.16682
_EVERY = ("mamba2", "attention", "mlp", "moe")
_QK = {"attention": {"qk_norm": True}}
METHODS: dict[str, dict[str, dict[str, object]]] = {
    "soft_temp": {"attention": {"soft_temp": 0.5}},
    "soft_cap": {"attention": {"soft_cap": 1.5}},
    "soft_clip": {"attention": {"soft_clip": (1.03, -0.03)}},
    "layer_scale": {name: {"layer_scale": 0.1} for name in _EVERY},
    "sigma_reparam": {name: {"sigma_reparam": True} for name in _EVERY if name != "moe"},
    "qk_norm": _QK,
    "qk_norm_cap": {"attention": {"qk_norm": True, "soft_cap": 1.5}},
    "qkv_norm": {"attention": {"qk_norm": True, "v_norm": True, "pre_norm": False}},
    "qk_fc_norm": {"attention": {"qk_norm": True, "post_norm": True}} | {n: {"post_norm": True} for n in _EVERY[2:]},
    "mamba norms": {"mamba2": {"pre_norm": False, "post_norm": True}},
}


def with_method(method: str, pattern: str = "M-*-ME", **changed: object) -> ModelConfig:
    """A hybrid, rotated and biased, with one method."""
    attention = ATTENTION | {"rope": ROPE, "qkv_bias": True}
    base = {"attention": attention, "mamba2": MAMBA, "mlp": {"d_ff": 24, "bias": True}, "moe": MOE}
    used = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
    sections = {used[letter]: base[used[letter]] | METHODS[method].get(used[letter], {}) for letter in set(pattern)}
    return config(pattern, **(sections | changed))


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
STABLE = {method: with_method(method) for method in METHODS}
