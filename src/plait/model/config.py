"""What a model is: its width, its vocabulary, and one spec per layer.

Every model of Plait is a pattern of layers: `M` Mamba-2, `*` attention, `-` feed-forward, `E` experts. Sizes may differ
from layer to layer, so nothing here speaks for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from plait.config import ConfigError, from_dict, nearest, read_fields, to_dict
from plait.model.layer import OFF, Cost, LayerSpec, require
from plait.model.layers import KINDS
from plait.model.presets import PRESETS

# what a pattern letter's sizes are called in settings
SECTIONS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a model is besides its layers.

    name: for people. family: whose checkpoints it is written as ("nemotron_h", "mamba2", "llama", "qwen2", "qwen3",
    "bitnet"). vocab_size, d_model: rows and width of the embedding. norm_eps: of every norm. ties_embeddings: the head
    is the embedding. residual_in_fp32: keep the stream in float32. max_context: tokens it was trained for. init_std:
    of fresh matrices. recipe: the precision it needs, if any: a known name, or a table as JSON (precision/reading.py).
    bos_id, eos_ids, pad_id: token ids, None or empty where there is none.
    """

    name: str = ""
    family: str = "nemotron_h"
    vocab_size: int
    d_model: int
    norm_eps: float = 1e-5
    ties_embeddings: bool = False
    residual_in_fp32: bool = False
    max_context: int = 8192
    init_std: float = 0.02
    recipe: str = "bf16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        require(self, at_least_one=("vocab_size", "d_model", "max_context"), positive=("norm_eps", "init_std"))
        if self.recipe.endswith(".toml"):
            # a checkpoint must not name files of the machine that reads it
            raise ConfigError(f"recipe={self.recipe!r}: a model names no file; write a known name or the table itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Frame):
    """A model: its frame, and one spec per layer, in order."""

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        Frame.__post_init__(self)
        if not self.layers:
            raise ConfigError("layers: a model needs at least one layer; give a pattern such as 'M-M*-'")

    @classmethod
    def from_pattern(cls, pattern: str, **sizes: object) -> "ModelConfig":
        """A model whose layers of one kind are alike.

        Args:
            pattern: one letter per layer, e.g. "M-M-M*-".
            sizes: the fields of Frame, and for each letter used its kind's spec, by the names mamba2, attention, mlp,
                moe; a spec is an instance or a mapping of its fields.

        Raises: ConfigError for an unknown letter or a kind without sizes.
        """
        return cls.from_dict({"pattern": pattern, **sizes})

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The published sizes of a named model; ConfigError naming the nearest one otherwise."""
        return cls.from_dict({"preset": name})

    @classmethod
    def from_dict(cls, data: Mapping[str, object], where: str = "") -> "ModelConfig":
        """Read the form of `to_dict`: a pattern with one section of sizes per kind, or a list of layers.

        `preset = "name"` begins with a published model, whose settings the others then change.

        Raises: ConfigError naming the field and the nearest known one.
        """
        rest = dict(data)
        if "preset" in rest:
            rest = _over(_preset(rest.pop("preset")), rest)
        at = f"{where}." if where else ""
        known = [f.name for f in fields(cls)] + ["pattern", "preset", *SECTIONS.values()]
        for key in rest:
            if key not in known:
                near = nearest(key, known)
                raise ConfigError(f"{at}{key}: unknown key" + (f"; did you mean {near!r}?" if near else ""))
        layers, pattern = rest.pop("layers", None), rest.pop("pattern", None)
        sections = {symbol: rest.pop(name, None) for symbol, name in SECTIONS.items()}
        frame = read_fields(Frame, rest, where)
        if layers is not None:
            if not isinstance(layers, list | tuple):
                raise ConfigError(f"{at}layers={layers!r}: expected a list of layers")
            specs = tuple(_spec(item, f"{at}layers[{i}]") for i, item in enumerate(layers))
        elif isinstance(pattern, str):
            specs = _of_pattern(pattern, sections, at)
        else:
            raise ConfigError(f"{at}pattern: give a pattern such as 'M-M*-', or layers, or a preset")
        return cls(layers=specs, **{f.name: getattr(frame, f.name) for f in fields(Frame)})

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready form that `from_dict` reads back: the pattern form where layers of a kind are alike."""
        data = {f.name: to_dict(getattr(self, f.name)) for f in fields(Frame)}
        data = {k: v for k, v in data.items() if v is not None}
        distinct = {spec.symbol: spec for spec in self.layers}
        if all(distinct[spec.symbol] == spec for spec in self.layers):
            data["pattern"] = self.pattern
            data |= {SECTIONS[symbol]: _present(spec) for symbol, spec in distinct.items()}
        else:
            data["layers"] = [{"kind": spec.symbol} | _present(spec) for spec in self.layers]
        return data

    @property
    def pattern(self) -> str:
        """One letter per layer."""
        return "".join(spec.symbol for spec in self.layers)

    def cost(self) -> Cost:
        """Sum over layers, embedding, final norm and head. The embedding's rows cost no FLOPs."""
        each = [KINDS[spec.symbol].cost(spec, self.d_model) for spec in self.layers]
        table = self.vocab_size * self.d_model
        outside = table * (1 if self.ties_embeddings else 2) + self.d_model
        total = {f.name: sum(getattr(cost, f.name) for cost in each) for f in fields(Cost)}
        total["params"] += outside
        total["active_params"] += outside
        total["flops_per_token"] += 2 * table
        return Cost(**total)


def _preset(name: object) -> Mapping[str, object]:
    if not isinstance(name, str) or name not in PRESETS:
        near = nearest(str(name), PRESETS)
        raise ConfigError(f"preset {name!r} is unknown" + (f"; did you mean {near!r}?" if near else ""))
    return PRESETS[name]


def _over(base: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """base with changes laid over it, inside sections too."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _of_pattern(pattern: str, sections: Mapping[str, object], at: str) -> tuple[LayerSpec, ...]:
    specs: dict[str, LayerSpec] = {}
    for symbol, sizes in sections.items():
        if isinstance(sizes, LayerSpec):
            specs[symbol] = sizes
        elif sizes is not None:
            specs[symbol] = from_dict(KINDS[symbol].spec, sizes, at + SECTIONS[symbol])  # type: ignore[arg-type]
    for i, symbol in enumerate(pattern):
        if symbol not in KINDS:
            known = ", ".join(f"{k} {v.name}" for k, v in KINDS.items())
            raise ConfigError(f"{at}pattern: unknown layer letter {symbol!r} at position {i}; known letters: {known}")
        if symbol not in specs:
            raise ConfigError(f"{at}pattern: letter {symbol!r} needs the sizes of its kind: add [{SECTIONS[symbol]}]")
    return tuple(specs[symbol] for symbol in pattern)


def _present(spec: LayerSpec) -> dict[str, object]:
    # options that are off stay unwritten, so that a model without them is written as ever
    return {k: v for k, v in to_dict(spec).items() if v is not None and (k not in OFF or v != OFF[k])}


def _spec(item: object, where: str) -> LayerSpec:
    if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
        raise ConfigError(f"{where}: expected a table with kind one of {', '.join(KINDS)}; got {item!r}")
    sizes = {k: v for k, v in item.items() if k != "kind"}
    return from_dict(KINDS[str(item["kind"])].spec, sizes, where)
