"""Whether a device can train a model in its precision: asked once, before the first step.

Formats without tensor cores on the device are emulated by bfloat16 products of their codes: the same numbers, at
bfloat16's speed less the rounding.
"""

from dataclasses import dataclass

import torch
from torch import nn

from plait.config import ConfigError
from plait.ops.self_test import self_test
from plait.precision.format import HIGH, LinearFormat, TensorFormat
from plait.precision.linear import Linear
from plait.precision.operand import is_native
from plait.precision.recipe import PrecisionRecipe

# the others have no 8-bit floating point numbers
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """How many of a model's matrix products are in the compute dtype, on tensor cores for few bits, or emulated."""

    high: int
    native: int
    emulated: int


def ready(model: nn.Module, recipe: PrecisionRecipe, device: torch.device) -> Products:
    """Refuse what this device cannot do, and try its rounding if the model needs it.

    Args:
        model: built in `recipe`.
        device: where it is.

    Raises: ConfigError naming format, device and what to do, also where the recipe's rules leave no layer to round;
        BackendError if the device rounds wrongly.
    """
    high = native = emulated = 0
    wanted: set[TensorFormat] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or layer.number_format == HIGH:
            high += 3 * isinstance(layer, Linear)
            continue
        wanted |= set(layer.number_format.operands.values())
        for pair in _pairs(layer.number_format):
            if None in pair:
                high += pair == (None, None)
                emulated += pair != (None, None)
            elif is_native(pair, device) and recipe.compute == torch.bfloat16:
                native += 1
            elif recipe.tensor_cores:
                spelled = " with ".join(str(form) for form in pair)
                dtype = str(recipe.compute).removeprefix("torch.")
                raise ConfigError(
                    f"precision {recipe.name!r}: {name} computes {spelled} to {dtype}, for which {device} has no "
                    "tensor cores; leave out tensor_cores=true to emulate it, or choose another format"
                )
            else:
                emulated += 1
    if not wanted and any(rule.format != HIGH for rule in recipe.rules):
        raise ConfigError(
            f"precision {recipe.name!r}: its rules leave all {high // 3} linear layers in the compute dtype, so that "
            "nothing is rounded; take a larger model, rules of your own with keeps_rules=false, or precision 'bf16'"
        )
    floats = [form for form in wanted if form.element in ("e4m3", "e5m2", "e2m1")]
    if floats:
        if device.type not in DEVICES:
            raise ConfigError(
                f"precision {recipe.name!r}: {floats[0]} cannot be held on {device}; choose the device "
                f"{' or '.join(DEVICES)}, or precision 'bf16'"
            )
        self_test(device)
    return Products(high=high, native=native, emulated=emulated)


def _pairs(form: LinearFormat) -> tuple[tuple[TensorFormat | None, TensorFormat | None], ...]:
    return form.fprop, form.dgrad, form.wgrad
