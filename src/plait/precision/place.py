"""Tells each linear layer of a built model where it stands, and what it therefore computes in.

Here a recipe meets a model: a rule that means no layer and a weight that its blocks do not divide are found before
anything is computed.
"""

import re
from collections.abc import Iterator

from torch import nn

from plait.config import ConfigError
from plait.precision.format import HIGH, LinearFormat
from plait.precision.linear import Linear
from plait.precision.moment import Moment
from plait.precision.recipe import Place, PrecisionRecipe
from plait.precision.weight_only import WeightOnlyLinear

# projections of an input that the one before has read too
_TOGETHER = ("attention.k_proj", "attention.v_proj", "mlp.gate_proj")


def places(model: nn.Module) -> Iterator[tuple[str, Linear | WeightOnlyLinear, Place | None]]:
    """Name, layer and place of all linear layers of a model, in order; the head has no place."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear | WeightOnlyLinear)]
    B = 1 + max((int(block[1]) for name, _ in layers if (block := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    ordinals: list[int] = []
    for _, layer in layers:
        begun = ordinals[-1] if ordinals else -1
        ordinals.append(begun + (layer.role not in _TOGETHER and layer.role != "head"))
    for (name, layer), i in zip(layers, ordinals, strict=True):
        block = re.match(r"blocks\.(\d+)\.", name)
        yield name, layer, Place(i=i, n=ordinals[-1] + 1, b=int(block[1]), B=B) if block else None


def settle(model: nn.Module, recipe: PrecisionRecipe) -> Moment:
    """Give each linear layer of a model its name and its format.

    Args:
        model: built by `recipe.linear`, on any device; layers are replaced where a rule for places says codes.
        recipe: what it is to compute in.

    Returns: the moment that all layers share.
    Raises: ConfigError for a rule of the recipe's own that means no layer, and for a weight that its blocks do not
        divide.
    """
    moment, met = Moment(), set()
    for name, layer, place in list(places(model)):
        met |= {rule for rule in recipe.rules[: recipe.n_own] if rule.matches(layer.role, place)}
        form = recipe.format(layer.role, place)
        if form.weight is not None and form.weight.is_held:
            _hold(model, name, layer, recipe, form)
            continue
        if isinstance(layer, WeightOnlyLinear):
            _hold(model, name, layer, recipe, form)
            layer = model.get_submodule(name)
            assert isinstance(layer, Linear)
        _check(name, layer, recipe, form)
        layer.name, layer.moment, layer.number_format = name, moment, form
        layer.late_format = form if recipe.switch is None else recipe.switch.later(form)
    for rule in recipe.rules[: recipe.n_own]:
        if rule not in met:
            roles = sorted({layer.role for _, layer, _ in places(model)})
            raise ConfigError(
                f"precision {recipe.name!r}: the rule {rule} means no layer of this model; its roles are "
                f"{', '.join(roles)}, its blocks 0 to {max((p.b for *_, p in places(model) if p), default=0)}"
            )
    return moment


def _hold(
    model: nn.Module, name: str, layer: Linear | WeightOnlyLinear, recipe: PrecisionRecipe, form: LinearFormat
) -> None:
    """Put a layer of another kind where a rule for places asks for it."""
    N, K = layer.shape
    parts = layer.parts if isinstance(layer, Linear) else ()
    other = recipe.layer(K, N, role=layer.role, bias=layer.bias is not None, parts=parts, form=form)
    if type(other) is not type(layer) or (isinstance(other, WeightOnlyLinear) and other.form != layer.form):  # type: ignore[union-attr]
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, other)


def _check(name: str, layer: Linear, recipe: PrecisionRecipe, form: LinearFormat) -> None:
    if form == HIGH:
        return
    keep = f'add a rule {{role = "{layer.role}", format = "bf16"}} before it'
    if layer.role == "head":
        raise ConfigError(f"precision {recipe.name!r}: the head's loss is computed in the compute dtype; leave it high")
    N, K = layer.shape
    N -= layer.n_high(form)
    if form.high and layer.parts and layer.n_high(form) != sum(n for _, n in _trailing(layer, form)):
        raise ConfigError(f"precision {recipe.name!r}: high = {list(form.high)} of {name} are not its last parts")
    for operand, tensor in form.operands.items():
        # what is summed over is the last dimension of each operand: d_in forward, d_out in the data gradient
        rows, columns = {"fprop.x": (1, K), "fprop.w": (N, K), "dgrad.dy": (1, N), "dgrad.w": (K, N)}.get(
            operand, (K, 128)
        )
        r, c = tensor.block if tensor.scale == "block" else (1, 1)
        if rows % r or columns % c:
            raise ConfigError(
                f"precision {recipe.name!r}: {name} is {N} x {K}, which blocks of {r}x{c} do not divide ({operand} in "
                f'"{tensor}"); choose sizes that are multiples of {max(r, c)}, or {keep}'
            )


def _trailing(layer: Linear, form: LinearFormat) -> list[tuple[str, int]]:
    """The last parts of a fused weight that stay high."""
    found = []
    for part in reversed(layer.parts):
        if part[0] not in form.high:
            break
        found.append(part)
    return found
