"""The kinds of layers a pattern is made of: one file each, listed here."""

from plait.model.layers import attention, mamba2, mlp, moe

KINDS = {kind.symbol: kind for kind in (mamba2.KIND, attention.KIND, mlp.KIND, moe.KIND)}
