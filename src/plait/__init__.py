"""Plait builds, trains, compresses, exports and serves hybrid Mamba-Transformer language models."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait import ops as ops
    from plait import precision as quant
    from plait.engine.engine import Engine
    from plait.engine.request import Sampling
    from plait.formats.checkpoint import load, save
    from plait.model.config import ModelConfig
    from plait.model.hybrid import build

# tensors in large pages: bfloat16 weights are read a fifth faster (LOG.md). PyTorch looks at its first allocation
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["Engine", "ModelConfig", "Sampling", "build", "load", "ops", "quant", "save"]

# public name -> (module, name in it; "" for the module itself), imported on first use so that `import plait` is cheap
_LAZY = {
    "load": ("plait.formats.checkpoint", "load"),
    "save": ("plait.formats.checkpoint", "save"),
    "build": ("plait.model.hybrid", "build"),
    "ModelConfig": ("plait.model.config", "ModelConfig"),
    "Engine": ("plait.engine.engine", "Engine"),
    "Sampling": ("plait.engine.request", "Sampling"),
    "ops": ("plait.ops", ""),
    "quant": ("plait.precision", ""),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'plait' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module_name, inner = _LAZY[name]
    module = import_module(module_name)
    value = getattr(module, inner) if inner else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
