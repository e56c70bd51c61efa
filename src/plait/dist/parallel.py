"""Changes how a model's blocks are executed, never what they compute: recompute and compilation.

Both replace the call of a block, so parameters, their names and checkpoints stay as they were.
"""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plait.model.hybrid import Block, Hybrid
from plait.model.layer import Span
from plait.model.layers.moe import MoEMixer


def recompute(model: Hybrid) -> Hybrid:
    """Keep only the stream between blocks for the backward pass, and run each block a second time there.

    Memory of activations falls from every intermediate to one (B, L, D) per block, for about a third more time.
    Gradients are the same numbers. Returns the model, changed in place.
    """
    for block in model.blocks:
        if not isinstance(block.forward, partial):  # once is enough
            block.forward = partial(_recomputed, block.forward)
    return model


def _recomputed(forward: Callable[..., Tensor], x: Tensor, span: Span, state: object = None) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, span, state)
    # no layer draws random numbers, so there is no generator to put back
    result = checkpoint(forward, x, span, state, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def compile_blocks(model: Hybrid, mode: Literal["auto", "on", "off"] = "auto") -> bool:
    """Compile every block with torch.compile, in place; the first steps take longer while it works.

    Blocks of one kind share what is compiled, and lengths are variables in it: one compilation per kind serves all.
    Experts stay as they are: how many tokens each takes is known only as they run.

    Args:
        model: call it after `recompute`.
        mode: "auto" compiles on a GPU with a C++ compiler at hand. On a CPU it stays off, and is best left so: compiled
            blocks take PyTorch's operations instead of the native kernels (scan, convolution, norms).

    Returns: whether it was compiled.
    Raises: ValueError for mode "on" without a C++ compiler.
    """
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
    if mode == "on" and not compiler:
        raise ValueError('compile="on" needs a C++ compiler (g++ or clang++); install one, or use compile="auto"')
    if mode == "off" or (mode == "auto" and not (compiler and model.device.type == "cuda")):
        return False
    for block in model.blocks:
        assert isinstance(block, Block)
        if not isinstance(block.mixer, MoEMixer):
            block.compile(dynamic=True)
    return True
