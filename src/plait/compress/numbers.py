"""In which numbers a model is held, and how many bytes its weights take in them.

A format is spelled by name or by bits:

    "bf16", "fp8", "nvfp4", ...   matrices at so many bits (scales included); embedding, head, norms and convolution in
                                  bfloat16, as deployments of these formats leave them
    "int8", "int4-32-zero", ...   a recipe of codes that the engine runs: its bytes exactly, head included
    "4 bit", 4.5                  every number of the model at so many bits, as papers estimate it
"""

import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from plait.config import ConfigError, nearest
from plait.model.config import ModelConfig
from plait.model.hybrid import Block, recipe_of
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.plan import left_out
from plait.precision import RECIPES
from plait.precision.linear import Linear
from plait.precision.recipe import ALWAYS_FLOAT32, PrecisionRecipe
from plait.precision.weight_only import CODED

# bits of a matrix's number with its share of scales: 16 under an E4M3 for NVFP4, 32 under a power of two for MX
MATRIX_BITS = {"fp32": 32, "bf16": 16, "fp8": 8, "mxfp8": 8.25, "nvfp4": 4.5, "mxfp4": 4.25, "ternary": 2}
# of one number of a cache
STATE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "nvfp4": 4.5, "int4": 4}
CODES = tuple(name for name, recipe in RECIPES.items() if recipe.weight_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Formats of weights, of keys and values, of the scan's states and of the convolution's windows."""

    weights: str | float = "bf16"
    kv: str | float = "bf16"
    ssm: str | float = "fp32"
    conv: str | float = "bf16"

    def __post_init__(self) -> None:
        format_of(self.weights)
        for field in ("kv", "ssm", "conv"):
            _bits(getattr(self, field), STATE_BITS, field)

    @property
    def kv_bytes(self) -> float:
        """Of one number of a key or value."""
        return _bits(self.kv, STATE_BITS, "kv") / 8

    @property
    def ssm_bytes(self) -> float:
        """Of one number of a scan's state."""
        return _bits(self.ssm, STATE_BITS, "ssm") / 8

    @property
    def conv_bytes(self) -> float:
        """Of one number of a convolution's window."""
        return _bits(self.conv, STATE_BITS, "conv") / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """stored: bytes. read: of them, bytes that one pass over some tokens reads."""

    stored: float
    read: float


def format_of(weights: str | float) -> float | str:
    """What a spelling of weights means: bits of every number, or a known name.

    Raises: ConfigError naming the nearest known one.
    """
    if isinstance(weights, str) and (weights in MATRIX_BITS or weights in CODES):
        return weights
    return _bits(weights, {}, "weights", known=(*MATRIX_BITS, *CODES))


def _bits(value: str | float, names: dict[str, float], field: str, known: tuple[str, ...] = ()) -> float:
    if isinstance(value, str) and value in names:
        return names[value]
    plain = re.fullmatch(r"([0-9.]+) ?-?(?:bits?)?", str(value))
    try:
        found = float(plain[1]) if plain else math.nan
    except ValueError:
        found = math.nan
    if 0 < found <= 64:
        return found
    known = known or tuple(names)
    near = nearest(str(value), known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"{field}={value!r} is no number format; {hint}; or bits, such as '4.5 bit'")


def layer_weights(spec: LayerSpec, d_model: int, weights: str | float = "bf16", tokens: int = 1) -> Held:
    """Bytes of one layer, its norm included.

    Of experts a pass reads those that its tokens choose, as in model/plan.py.
    """
    held = _by_one_token(spec, d_model, weights)
    return Held(stored=held.stored, read=held.stored - (held.stored - held.read) * left_out(spec) ** (tokens - 1))


@cache
def _by_one_token(spec: LayerSpec, d_model: int, weights: str | float) -> Held:
    cost, form = KINDS[spec.symbol].cost(spec, d_model), format_of(weights)
    if isinstance(form, str):
        shell = ModelConfig(vocab_size=1, d_model=d_model, layers=(spec,))
        with torch.device("meta"):
            stored = _bytes(Block(spec, shell, _recipe(form)), form)
        # only stacked experts are ever left out
        expert = MATRIX_BITS[form] / 8 if form in MATRIX_BITS else _width(form)
    else:
        stored, expert = cost.params * form / 8, form / 8
    return Held(stored=stored, read=stored - (cost.params - cost.active_params) * expert)


def rest_weights(config: ModelConfig, weights: str | float = "bf16") -> Held:
    """Bytes of embedding, head and final norm; a step reads one row of an embedding that is not the head."""
    table, form = config.vocab_size * config.d_model, format_of(weights)
    number = _width(form) if isinstance(form, str) else form / 8
    head, has_own = table * number, not config.ties_embeddings
    recipe = _recipe(form) if isinstance(form, str) else None
    if isinstance(form, str) and recipe is not None and recipe.weight_only and (has_own or recipe.copies_head):
        with torch.device("meta"):
            head, has_own = _bytes(recipe.linear(config.d_model, config.vocab_size, role="head"), form), True
    row = config.d_model * number
    return Held(
        stored=table * number + head * has_own + row,
        read=head + row + row * has_own,
    )


def _recipe(form: str) -> PrecisionRecipe:
    return recipe_of(form if form in CODES else "bf16")


def _width(form: str) -> int:
    """Bytes of a number that stays high."""
    return 4 if form == "fp32" else 2


def _bytes(module: nn.Module, form: str) -> float:
    """Of a module built on meta, as it would be held."""
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, Linear)}
    total = 0.0
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        dotted = f".{name}"
        if dotted.endswith(CODED):
            total += t.nbytes
        elif dotted.endswith(ALWAYS_FLOAT32):
            total += 4 * t.numel()
        # stacked experts are matrices too, but the engine's own recipes leave them high
        elif form in MATRIX_BITS and (id(t) in matrices or t.dim() == 3):
            total += t.numel() * MATRIX_BITS[form] / 8
        else:
            total += t.numel() * _width(form)
    return total
