"""What a smaller model is to be: which layers of the teacher stay, and what sizes they get.

A plan is a candidate of every search. It says nothing about which units stay: the scores decide that when it is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from plait.compress.axes import AXES
from plait.config import to_dict
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.layers.attention import Attention
from plait.model.layers.moe import MoE

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """kept: the teacher's layers that stay, in order; config: of the smaller model, layer i made from layer kept[i].

    replaced: a teacher's layer among those kept -> a safetensors file with another block for its place, tensors named
    as below a block ("norm.weight", "mixer.in_proj.weight"), of the teacher's width and otherwise the config's sizes.
    """

    kept: tuple[int, ...]
    config: ModelConfig
    replaced: Mapping[int, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready form that `from_dict` reads back."""
        replaced = {str(layer): str(path) for layer, path in self.replaced.items()}
        return {"kept": list(self.kept), "config": self.config.to_dict(), "replaced": replaced}

    @staticmethod
    def from_dict(data: Mapping[str, object]) -> "Plan":
        """Read what `to_dict` gave; ValueError naming what is wrong with it."""
        kept, config, replaced = (data.get(name) for name in ("kept", "config", "replaced"))
        if not isinstance(kept, list | tuple) or not isinstance(config, Mapping):
            raise ValueError("a plan has kept, a list of layers, and config, a table; this is none")
        files = replaced if isinstance(replaced, Mapping) else {}
        return Plan(
            kept=tuple(int(i) for i in kept),
            config=ModelConfig.from_dict(config, "config"),
            replaced={int(layer): Path(str(path)) for layer, path in files.items()},
        )


def whole(teacher: ModelConfig) -> Plan:
    """The plan that changes nothing."""
    return Plan(kept=tuple(range(len(teacher.layers))), config=teacher)


def shrunk(
    teacher: ModelConfig,
    kept: tuple[int, ...] | None = None,
    *,
    d_model: int | None = None,
    sizes: Mapping[str | int, Sizes] | None = None,
) -> Plan:
    """The plan of some layers with some sizes changed.

    Args:
        teacher: what it starts from.
        kept: its layers that stay; None for all.
        d_model: the new width; None for the old one.
        sizes: a pattern letter or a layer of the teacher (which wins) -> fields of its spec.

    Raises: ValueError as of `check`, and for sizes of an unknown letter or layer.
    """
    sizes, kept = sizes or {}, tuple(range(len(teacher.layers))) if kept is None else tuple(kept)
    _check_kept(kept, len(teacher.layers))
    for key in sizes:
        if key not in KINDS and key not in range(len(teacher.layers)):
            raise ValueError(
                f"sizes of {key!r}: give a letter, one of {' '.join(KINDS)}, or a layer, 0 to {len(teacher.layers) - 1}"
            )
    layers = [
        _resized(teacher.layers[i], {**sizes.get(teacher.layers[i].symbol, {}), **sizes.get(i, {})}, i) for i in kept
    ]
    config = replace(teacher, layers=tuple(layers), d_model=teacher.d_model if d_model is None else d_model)
    plan = Plan(kept=kept, config=config)
    check(plan, teacher)
    return plan


def check(plan: Plan, teacher: ModelConfig) -> None:
    """Refuse what cannot be cut from a teacher.

    Raises: ValueError naming the layer, the field, its value and what is allowed.
    """
    _check_kept(plan.kept, len(teacher.layers))
    if len(plan.config.layers) != len(plan.kept):
        raise ValueError(
            f"the plan keeps {len(plan.kept)} layers, its config has {len(plan.config.layers)}; give each one"
        )
    for name in (f.name for f in fields(ModelConfig) if f.name not in ("name", "layers", "d_model")):
        old, new = getattr(teacher, name), getattr(plan.config, name)
        if old != new:
            raise ValueError(f"{name}={new!r}: a cut keeps the teacher's, {old!r}")
    if not 1 <= plan.config.d_model <= teacher.d_model:
        raise ValueError(f"d_model={plan.config.d_model}: must be 1 to the teacher's {teacher.d_model}")
    for layer in plan.replaced:
        if layer not in plan.kept:
            raise ValueError(f"replaced names layer {layer}, which is not kept; kept are {list(plan.kept)}")
    for layer, wanted in zip(plan.kept, plan.config.layers, strict=True):
        if layer not in plan.replaced:
            _check_layer(f"layer {layer}", teacher.layers[layer], wanted)


def _check_kept(kept: tuple[int, ...], n: int) -> None:
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= n:
        raise ValueError(f"kept={list(kept)}: give layers of the teacher, 0 to {n - 1}, ascending, each once")


def _resized(spec: LayerSpec, changes: Sizes, layer: int) -> LayerSpec:
    known = [f.name for f in fields(spec)]
    for name in changes:
        if name not in known:
            kind = KINDS[spec.symbol].name
            raise ValueError(f"layer {layer} ({kind}) has no size {name!r}; it has {', '.join(known)}")
    return replace(spec, **changes)  # type: ignore[arg-type]


def _check_layer(where: str, old: LayerSpec, new: LayerSpec) -> None:
    if type(old) is not type(new):
        raise ValueError(
            f"{where} is {KINDS[old.symbol].name} and cannot be cut to {KINDS[new.symbol].name}; replace it"
        )
    cuttable = [name for axis in AXES.values() if axis.symbol == old.symbol for name in axis.fields]
    was, wanted = to_dict(old), to_dict(new)
    assert isinstance(was, dict) and isinstance(wanted, dict)
    for name in was:
        if was[name] == wanted[name]:
            continue
        if name not in cuttable:
            raise ValueError(
                f"{where}: no cut changes {name} from {was[name]} to {wanted[name]}; {', '.join(cuttable)} can"
            )
        # without a shared expert from the beginning there is none to keep
        if not (0 if name == "d_shared" else 1) <= wanted[name] <= was[name]:
            raise ValueError(f"{where}: {name}={wanted[name]} is not within 1 and the teacher's {was[name]}")
    if old != new and old.sigma_reparam:
        raise ValueError(
            f"{where} has sigma_reparam=true: its weights are scaled by their norm, which a cut would change"
        )
    if isinstance(old, Attention) and isinstance(new, Attention):
        more = new.n_heads // new.n_kv_heads > old.n_heads // old.n_kv_heads
        if more and old.n_kv_heads % new.n_kv_heads:
            raise ValueError(
                f"{where}: n_heads={new.n_heads} on n_kv_heads={new.n_kv_heads}: more query heads per key/value head "
                f"need these to be averaged, and {new.n_kv_heads} does not divide {old.n_kv_heads}"
            )
    if isinstance(old, MoE) and isinstance(new, MoE) and old.d_shared and not new.d_shared:
        raise ValueError(f"{where}: d_shared=0 would take the shared expert away; give at least 1")
