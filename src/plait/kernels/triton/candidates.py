"""What tuning tries for each kernel: values for its keywords, most influential first, beside the defaults' own.

A kernel without a row is tried with other numbers of warps. Values that do not compile or fit on a GPU are passed over,
so they may be bold; each costs a second of compiling.
"""

WARPS = (2, 4, 8)
STAGES = (1, 2, 3)

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "rms_norm": {"NUMBERS": (2048, 4096, 8192), "num_warps": (4, 8, 16)},
    "rms_norm_backward": {"NUMBERS": (2048, 4096, 8192), "PER_SM": (1, 2, 4), "STAGES": (1, 2, 3), "num_warps": (4, 8)},
    "gated_rmsnorm": {"NUMBERS": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
    "gated_rmsnorm_backward": {
        "NUMBERS": (1024, 2048, 4096),
        "PER_SM": (1, 2, 4),
        "STAGES": (1, 2),
        "num_warps": (4, 8),
    },
    "causal_conv1d": {
        "SPAN": (32, 64, 128, 256),
        "BLOCK": (256, 512, 1024),
        "num_warps": (1, 2, 4),
        "STAGES": (2, 3, 4),
    },
    "causal_conv1d_backward": {"SPAN": (64, 128, 256, 512), "BLOCK": (128, 256, 512), "num_warps": (1, 2, 4)},
    "squared_relu": {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8)},
    "gate": {"BLOCK": (1024, 2048, 4096), "num_warps": (4, 8)},
    "rotate": {"NUMBERS": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
    "cross_entropy_rows": {"BLOCK": (2048, 4096, 8192, 16384), "num_warps": (4, 8, 16), "num_stages": STAGES},
    "sample": {"BLOCK": (4096, 8192, 16384), "num_warps": (8, 16, 32)},
    "decode_attention": {"BLOCK_N": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "selective_state_update": {"BLOCK_P": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    "ssd_scan": {"Q": (32, 64, 128), "num_warps": (4, 8), "num_stages": STAGES},
    "ssd_scan_large": {"Q": (32, 64, 128), "num_warps": (4, 8), "num_stages": STAGES},
    "ssd_scan_largest": {"Q": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "ssd_gradients": {"Q": (32, 64, 128), "num_warps": (4, 8), "num_stages": STAGES},
    "ssd_gradients_large": {"Q": (32, 64, 128), "num_warps": (4, 8), "num_stages": STAGES},
    "ssd_gradients_largest": {"Q": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    "ssd_walk": {"num_warps": WARPS, "num_stages": STAGES},
    "ssd_walk_large": {"num_warps": (4, 8), "num_stages": STAGES},
    "ssd_walk_largest": {"num_warps": (4, 8), "num_stages": (1, 2)},
}


def values(kernel: str) -> dict[str, tuple[int, ...]]:
    """Keyword -> what to try."""
    return CANDIDATES.get(kernel, {"num_warps": WARPS})
