"""Translates tensor names between our models and a format: rules written once, run both ways.

A rule is a name of ours inside its layer and the name on disk, with {n} for their layer number and {j} for an expert.
What a file lacks or has too much is an error that lists the names as they are in the file.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from plait.formats.error import CheckpointError
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.precision.plain import FP32
from plait.precision.weight_only import CODED

log = logging.getLogger("plait.formats")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """ours: "mixer.conv.weight". theirs: "backbone.layers.{n}.mixer.conv1d.weight".

    sizes: config fields that decide its shape, for messages. axis: theirs has one more axis, of size one, here.
    stacked: ours is a stack of theirs along a new first axis; theirs counts them by {j}.
    """

    ours: str
    theirs: str
    sizes: str = ""
    axis: int | None = None
    stacked: bool = False

    def shape(self, ours: Shape) -> Shape:
        """Shape of one tensor on disk, given ours."""
        shape = ours[1:] if self.stacked else ours
        return shape if self.axis is None else (*shape[: self.axis], 1, *shape[self.axis :])

    def names(self, n: int, ours: Shape) -> list[str]:
        """Names on disk of what is one tensor of ours."""
        if self.stacked:
            return [self.theirs.format(n=n, j=j) for j in range(ours[0])]
        return [self.theirs.format(n=n)]


def rule(ours: str, theirs: str, sizes: str = "", *, axis: int | None = None, stacked: bool = False) -> Rule:
    """A rule in one line."""
    return Rule(ours=ours, theirs=theirs, sizes=sizes, axis=axis, stacked=stacked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """All rules of one format.

    rules: by layer letter; "" holds those outside of layers.
    layer: (our layer index) to the number in their names.
    spellings: (regular expression, replacement) pairs that turn other programs' names into those of the rules.
    ignored: shell patterns of names that hold nothing of the model.
    """

    rules: Mapping[str, tuple[Rule, ...]]
    layer: Callable[[int], int] = lambda i: i
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    by_name: Mapping[tuple[str, str], Rule] = field(init=False)

    def __post_init__(self) -> None:
        table = {(symbol, r.ours): r for symbol, rules in self.rules.items() for r in rules}
        object.__setattr__(self, "by_name", table)

    def find(self, config: ModelConfig, ours: str) -> tuple[Rule, int] | None:
        """The rule for one of our names and their number of its layer; None where there is no rule."""
        symbol, inner, i = "", ours, 0
        if ours.startswith("blocks."):
            _, index, inner = ours.split(".", 2)
            i = int(index)
            symbol = config.layers[i].symbol
        found = self.by_name.get((symbol, inner))
        return None if found is None else (found, self.layer(i))


def shapes_of(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of a model's parameters and buffers, by our names; allocates nothing."""
    with torch.device("meta"):
        model = Hybrid(config, FP32)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def to_ours(names: Names, config: ModelConfig, stored: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The tensors of a file, by our names.

    Args:
        names: the rules.
        config: what the model must look like.
        stored: the tensors by the names in the file.
        where: the folder, for messages.

    Raises: CheckpointError listing missing or leftover names, or naming the tensor whose shape is wrong.
    """
    spelled = {_spell(names.spellings, name): name for name in stored}
    ours: dict[str, LazyTensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, shape in shapes_of(config).items():
        found = names.find(config, name)
        if found is None:
            raise CheckpointError(
                f"{where}: a {config.family} checkpoint has no place for {name}, which the config asks for"
            )
        r, n = found
        theirs = r.names(n, shape)
        merged = _merged(r, n)
        if r.stacked and merged in spelled:
            # some programs store the experts of a layer as one tensor, as we hold them
            theirs, r = [merged], Rule(ours=r.ours, theirs=merged, sizes=r.sizes)
        absent = [name for name in theirs if name not in spelled]
        missing += absent
        if absent:
            continue
        files = [spelled[name] for name in theirs]
        used.update(files)
        parts = [_of_shape(stored[file], r.shape(shape), file, r.sizes, where) for file in files]
        ours[name] = (LazyTensor.stack(parts) if r.stacked else parts[0]).reshaped(shape)
    leftover = _leftover(names, stored, used)
    if missing or leftover:
        raise CheckpointError(_unmatched(missing, leftover, where))
    return ours


def to_theirs(names: Names, config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Our tensors by the names of a format, stacks taken apart.

    Raises: CheckpointError naming a tensor that the format has no name for.
    """
    theirs: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        found = names.find(config, name)
        if found is None:
            raise CheckpointError(f"a {config.family} checkpoint has no place for {name}; save as native")
        r, n = found
        shape = r.shape(tensor.shape)
        for j, their in enumerate(r.names(n, tensor.shape)):
            theirs[their] = (tensor.row(j) if r.stacked else tensor).reshaped(shape)
    return theirs


def same_names(config: ModelConfig, stored: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Check tensors that have our names already, codes of a weight-only recipe too; errors are those of `to_ours`."""
    recipe = recipe_of(config.recipe)
    with torch.device("meta"):
        expected = Hybrid(config, recipe if recipe.weight_only else FP32).state_dict()
    missing = [name for name in expected if name not in stored]
    leftover = [name for name in stored if name not in expected]
    if missing or leftover:
        raise CheckpointError(_unmatched(missing, leftover, where))
    for name, tensor in expected.items():
        found = stored[name].dtype
        if name.endswith(CODED) and found != tensor.dtype:
            raise CheckpointError(f"{where}: tensor {name!r} holds {found}, {config.recipe!r} has {tensor.dtype} there")
    return {name: _of_shape(stored[name], tuple(t.shape), name, "config", where) for name, t in expected.items()}


def _spell(spellings: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, replacement in spellings:
        name = re.sub(pattern, replacement, name)
    return name


def _merged(r: Rule, n: int) -> str:
    return r.theirs.replace(".{j}", "").removesuffix(".weight").format(n=n)


def _of_shape(tensor: LazyTensor, shape: Shape, name: str, sizes: str, where: str) -> LazyTensor:
    if not name.endswith(CODED) and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1):
        raise CheckpointError(
            f"{where}: tensor {name!r} holds {tensor.dtype} codes; quantised weights are not read yet, "
            "take the checkpoint in bfloat16"
        )
    if tensor.shape != shape:
        look = f"; look at {sizes} in the config" if sizes else ""
        raise CheckpointError(f"{where}: tensor {name!r} has shape {tensor.shape}, the config asks for {shape}{look}")
    return tensor


def _leftover(names: Names, stored: Iterable[str], used: set[str]) -> list[str]:
    left = [name for name in stored if name not in used]
    ignored = [name for name in left if any(fnmatchcase(name, pattern) for pattern in names.ignored)]
    if ignored:
        log.info("%d tensors are not part of the model and stay unread (%s, ...)", len(ignored), ignored[0])
    return [name for name in left if name not in set(ignored)]


def _unmatched(missing: list[str], leftover: list[str], where: str) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

    parts = [f"{len(missing)} tensors are missing ({some(missing)})"] if missing else []
    parts += [f"{len(leftover)} tensors have no place in the model ({some(leftover)})"] if leftover else []
    return f"{where}: {' and '.join(parts)}; config and tensors do not belong together, or a file was changed"
