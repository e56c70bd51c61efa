"""Puzzle's library: what may stand in the place of each layer: itself, a narrower one, another kind, or nothing.

Narrower layers begin as cuts of the teacher's, by its scores; layers of another kind begin fresh, in the size that the
model's other layers of that kind have. What they then learn is in local.py.

Source   Bercovich et al. 2024, arXiv:2411.19146 section 3.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from plait.compress.grid import sizes_within
from plait.compress.plan import Plan, shrunk
from plait.compress.prune import prune
from plait.compress.score import Scores
from plait.formats.checkpoint import Checkpoint
from plait.formats.safetensors import open_file
from plait.model.config import ModelConfig
from plait.model.hybrid import Block, Hybrid, recipe_of
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.precision.recipe import PrecisionRecipe

KEEP, NONE = "keep", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """What may stand in a layer's place. spec: None for nothing at all. is_fresh: it cannot be cut from the layer."""

    layer: int
    name: str
    spec: LayerSpec | None
    is_fresh: bool = False

    @property
    def learns(self) -> bool:
        """Whether it has weights of its own."""
        return self.spec is not None and self.name != KEEP

    def file(self, folder: Path) -> Path:
        """Where its weights lie in a library's folder."""
        return folder / f"layer-{self.layer:03}" / f"{self.name.replace(' ', '-').replace(',', '')}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """Which replacements are offered; shares are of the layer's own size, rounded to what its kind allows.

    d_ff, n_kv_heads, n_heads, head_dim, d_state, n_experts: of feed-forward, attention (whole groups), Mamba-2 (heads,
    channels of each, states) and expert layers. none: nothing in a layer's place. swaps: Mamba-2 for attention and the
    reverse, where the model has both.
    """

    d_ff: tuple[float, ...] = (0.75, 0.5, 0.25)
    n_kv_heads: tuple[float, ...] = (0.5,)
    n_heads: tuple[float, ...] = (0.75, 0.5)
    head_dim: tuple[float, ...] = ()
    d_state: tuple[float, ...] = (0.5,)
    n_experts: tuple[float, ...] = (0.75, 0.5)
    none: bool = True
    swaps: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            shares = getattr(self, f.name)
            if isinstance(shares, tuple) and not all(0 < share < 1 for share in shares):
                raise ValueError(f"{f.name}={shares}: shares of a layer's size lie between 0 and 1")


# which shares of the menu are for which kind: letter -> fields
OF_KIND = {"-": ("d_ff",), "*": ("n_kv_heads",), "M": ("n_heads", "head_dim", "d_state"), "E": ("n_experts",)}
SWAPS = {"M": "*", "*": "M"}
Library = tuple[tuple[Replacement, ...], ...]


def library(teacher: ModelConfig, menu: Menu | None = None) -> Library:
    """The replacements of every layer, itself first.

    Args:
        teacher: whose layers they replace.
        menu: what is offered; the usual one if None.
    """
    menu = menu or Menu()
    common = _usual(teacher)
    found = []
    for i, spec in enumerate(teacher.layers):
        row = [Replacement(layer=i, name=KEEP, spec=spec)]
        row += [Replacement(layer=i, name=name, spec=s) for name, s in _narrower(teacher, spec, menu)]
        other = common.get(SWAPS.get(spec.symbol, ""))
        if menu.swaps and other is not None:
            row.append(Replacement(layer=i, name=KINDS[other.symbol].name.lower(), spec=other, is_fresh=True))
        if menu.none:
            row.append(Replacement(layer=i, name=NONE, spec=None))
        found.append(tuple(row))
    return tuple(found)


def _usual(teacher: ModelConfig) -> dict[str, LayerSpec]:
    """The most frequent spec of each kind, of equals the first."""
    counts = Counter(teacher.layers)
    return {spec.symbol: spec for spec in sorted(counts, key=counts.__getitem__)}


def _narrower(teacher: ModelConfig, spec: LayerSpec, menu: Menu) -> Iterator[tuple[str, LayerSpec]]:
    alone = replace(teacher, layers=(spec,))
    seen = {spec}
    for name in OF_KIND.get(spec.symbol, ()):
        for share in getattr(menu, name):
            own = getattr(spec, name)
            unit = _unit(spec, name)
            sizes = sizes_within(spec, {name: max(unit, round(own * share / unit) * unit)})
            try:
                smaller = shrunk(alone, sizes={0: sizes}).config.layers[0]
            except ValueError:
                # a menu speaks of all layers of a kind; a share that one of them cannot have is not offered there
                continue
            if smaller not in seen:
                seen.add(smaller)
                yield f"{name} {sizes[name]}", smaller


def _unit(spec: LayerSpec, name: str) -> int:
    """What a size must be a multiple of, or had better be."""
    if name in ("n_heads", "n_experts"):
        return spec.n_groups  # type: ignore[attr-defined]
    own = getattr(spec, name)
    return next((unit for unit in (64, 32, 16, 8, 4) if own >= 8 * unit and own % unit == 0), 1)


def begun(checkpoint: Checkpoint, scores: Scores, wanted: Replacement, recipe: PrecisionRecipe, seed: int) -> Block:
    """A replacement before it has learnt anything, on the CPU: cut from its layer, or fresh."""
    assert wanted.spec is not None, "nothing has no weights"
    config, layer = replace(checkpoint.config, layers=(wanted.spec,)), wanted.layer
    if not wanted.is_fresh:
        cut = prune(checkpoint, Plan(kept=(layer,), config=config), scores)
        return _filled(config, recipe, {n.removeprefix("blocks.0."): t.read() for n, t in cut.tensors.items()})
    block = empty(config, recipe)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    n_layers = len(checkpoint.config.layers)
    for name, parameter in block.named_parameters():
        if not name.startswith("mixer."):
            parameter.data.fill_(wanted.spec.layer_scale or 1.0 if name == "scale" else 1.0)
    with torch.no_grad():
        KINDS[wanted.spec.symbol].init(block.mixer, config.init_std, n_layers, generator)
    return block


def learnt(teacher: ModelConfig, wanted: Replacement, folder: Path, recipe: PrecisionRecipe) -> Block:
    """A replacement as its file holds it.

    Raises: OSError if there is no such file.
    """
    assert wanted.spec is not None, "nothing has no weights"
    tensors = {name: tensor.read() for name, tensor in open_file(wanted.file(folder)).items()}
    return _filled(replace(teacher, layers=(wanted.spec,)), recipe, tensors)


def empty(config: ModelConfig, recipe: PrecisionRecipe) -> Block:
    """The first layer of a config, not filled, on the CPU, in float32 (float64 where that is computed in)."""
    with torch.device("meta"):
        model = Hybrid(config, recipe)
    block = model.blocks[0].to_empty(device="cpu").to(torch.promote_types(recipe.compute, torch.float32))
    assert isinstance(block, Block)
    return block


def _filled(config: ModelConfig, recipe: PrecisionRecipe, tensors: Mapping[str, torch.Tensor]) -> Block:
    block = empty(config, recipe)
    named = block.state_dict()
    for name, tensor in named.items():
        tensor.copy_(tensors[name])
    return block


def plain(teacher: Hybrid) -> PrecisionRecipe:
    """The plain recipe that computes in the teacher's dtype: what replacements are trained and scored in."""
    compute = teacher.recipe.compute
    return recipe_of("bf16" if compute == torch.bfloat16 else "fp32").computing_in(compute)
