"""Cuts a smaller checkpoint out of a teacher: a function from checkpoint to checkpoint that reads nothing by itself.

Units are chosen by their scores; each tensor of the result is a few lazy edits over the teacher's. The plan that keeps
everything gives the same tensors, to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plait.compress.axes import AXES
from plait.compress.axis import WHOLE, Axis, Edits, How, Units, best
from plait.compress.dims import outputs
from plait.compress.edits import Edit, edited
from plait.compress.plan import Plan, check
from plait.compress.score import Scores, chosen_axes
from plait.formats.checkpoint import Checkpoint
from plait.formats.quantize import holds_codes
from plait.formats.safetensors import open_file
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.model.layer import LayerSpec


def prune(
    checkpoint: Checkpoint,
    plan: Plan,
    scores: Scores,
    *,
    by: Mapping[str, str] | None = None,
    merge: bool = True,
    rescale: bool = True,
) -> Checkpoint:
    """Cut a checkpoint to a plan.

    Args:
        checkpoint: the teacher, with weights and not codes.
        plan: what is to stay of it.
        scores: of this teacher: which units are worth most; only axes that the plan makes smaller are looked at.
        by: axis -> measure; the usual one of each that is not named.
        merge: add what twins that go send to the stream to the twin that stays.
        rescale: scale the weights of gated and sub-norms, and of the stream's, so that what stays keeps its size though
            the norm now divides by the mean over less. With both off, entries are taken and nothing is changed.

    Returns: a checkpoint whose tensors are computed when they are read; nothing of layers that go is ever read.
    Raises: ValueError for a plan that cannot be cut, scores of another model, axes that there are not, units that were
        not scored, or weights that are codes.
    """
    if holds_codes(checkpoint):
        raise ValueError(
            f"{checkpoint.folder}: its weights are {checkpoint.recipe} codes; cut what they were made from"
        )
    teacher = checkpoint.config
    check(plan, teacher)
    chosen_axes(by)
    if (scores.config.d_model, scores.config.layers) != (teacher.d_model, teacher.layers):
        raise ValueError(
            f"the scores are of {scores.config.pattern}, d_model={scores.config.d_model}, and not of "
            f"{checkpoint.folder}, {teacher.pattern}, d_model={teacher.d_model}, in its sizes; score it"
        )

    source, specs = dict(checkpoint.tensors), list(teacher.layers)
    edits: Edits = {}

    def how(axis: Axis, where: str = "") -> How:
        def read(name: str) -> Tensor | None:
            return _edited(source, edits, where + name).read() if where + name in source else None

        return How(by=(by or {}).get(axis.name, axis.measures[0]), read=read, merge=merge, rescale=rescale)

    for layer, wanted in zip(plan.kept, plan.config.layers, strict=True):
        if layer in plan.replaced:
            specs[layer] = wanted
            source = {name: t for name, t in source.items() if not name.startswith(f"blocks.{layer}.")}
            source |= {f"blocks.{layer}.{name}": t for name, t in open_file(plan.replaced[layer]).items()}
            continue
        where, spec = f"blocks.{layer}.", specs[layer]
        for axis in AXES.values():
            changes = {name: getattr(wanted, name) for name in axis.fields if axis.symbol == spec.symbol}
            if axis.cut is not None and any(getattr(spec, name) != value for name, value in changes.items()):
                units = _units(scores, axis, layer, how(axis).by)
                _then(edits, axis.cut(spec, wanted, units, how(axis, where)), where)
                spec = replace(spec, **changes)
    if merge:
        _louder_twins(edits, source, plan, scores, specs)
    if plan.config.d_model < teacher.d_model:
        axis = AXES["width"]
        units = _units(scores, axis, WHOLE, how(axis).by)
        assert axis.cut is not None
        _then(edits, axis.cut(replace(teacher, layers=tuple(specs)), plan.config, units, how(axis)))
    tensors = _named(source, edits, plan)
    _check_shapes(tensors, plan.config)
    provenance = {**checkpoint.provenance, "cut": {"kept": list(plan.kept), "d_model": plan.config.d_model}}
    return replace(checkpoint, config=plan.config, tensors=tensors, provenance=provenance)


def kept_channels(plan: Plan, scores: Scores, by: str | None = None) -> tuple[int, ...]:
    """Which channels of the teacher's residual stream stay, ascending."""
    if plan.config.d_model == scores.config.d_model:
        return tuple(range(plan.config.d_model))
    return tuple(best(scores.of("width", WHOLE, by), plan.config.d_model).tolist())


def _louder_twins(
    edits: Edits, source: Mapping[str, LazyTensor], plan: Plan, scores: Scores, specs: Sequence[LayerSpec]
) -> None:
    """Let layers whose twins go add as much as both did, where that was found to do less harm."""
    for layer, (twin, factor) in scores.merges.items():
        if layer in plan.kept or twin not in plan.kept or twin in plan.replaced:
            continue
        for name in (f"blocks.{twin}.{name}" for name in outputs(specs[twin])):
            if name in source:
                n = _edited(source, edits, name).shape[0]
                _then(edits, {(name, 0): Edit.scale(torch.full((n,), factor))})


def _units(scores: Scores, axis: Axis, layer: int, by: str) -> Units:
    # raises what is wrong, if anything
    scores.of(axis.name, layer, by)
    return scores.units[axis.name, layer]


def _then(edits: Edits, later: Edits, where: str = "") -> None:
    """Let further edits follow, whose names begin below `where`."""
    for (name, dim), edit in later.items():
        place = where + name, dim
        edits[place] = edits[place].then(edit) if place in edits else edit


def _edited(source: Mapping[str, LazyTensor], edits: Edits, name: str) -> LazyTensor:
    tensor = source[name]
    return edited(tensor, {dim: edits[name, dim] for dim in range(len(tensor.shape)) if (name, dim) in edits})


def _named(source: Mapping[str, LazyTensor], edits: Edits, plan: Plan) -> dict[str, LazyTensor]:
    """The edited tensors under the names that they have in the smaller model."""
    place = {layer: i for i, layer in enumerate(plan.kept)}
    tensors: dict[str, LazyTensor] = {}
    for name in source:
        new = name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            if int(layer) not in place:
                continue
            new = f"blocks.{place[int(layer)]}.{rest}"
        tensors[new] = _edited(source, edits, name)
    return tensors


def _check_shapes(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> None:
    """What the model of this config has must be there, in these shapes: a replacement may not be what it should."""
    with torch.device("meta"):
        model = Hybrid(config, recipe_of("fp32"))
    for name, wanted in model.state_dict().items():
        found = tensors.get(name)
        if found is None or found.shape != tuple(wanted.shape):
            given = "is missing" if found is None else f"has shape {found.shape}"
            raise ValueError(
                f"tensor {name} {given}, the plan's model needs {tuple(wanted.shape)}; check what replaced it"
            )
