"""What a model is: its width, its vocabulary, and one spec per layer.

Every model of Plait is a pattern of layers: `M` Mamba-2, `*` attention, `-` feed-forward, `E` experts. Sizes may differ
from layer to layer, so nothing here speaks for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby

from plait.config import ConfigError, from_dict, nearest, to_dict
from plait.model.layer import Cost, LayerSpec
from plait.model.layers import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of a model.

    name: for people. family: whose checkpoints it is written as ("nemotron_h", "mamba2", "llama", "qwen2", "qwen3",
    "bitnet"). vocab_size, d_model: rows and width of the embedding. layers: one spec per layer, in order.
    norm_eps: of every norm. ties_embeddings: the head is the embedding. residual_in_fp32: keep the stream in float32.
    max_context: tokens it was trained for. init_std: of fresh matrices. recipe: the number format it needs, if any.
    bos_id, eos_ids, pad_id: token ids, None or empty where there is none.
    """

    name: str = ""
    family: str = "nemotron_h"
    vocab_size: int
    d_model: int
    layers: tuple[LayerSpec, ...]
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
        for field in ("vocab_size", "d_model", "max_context"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: must be at least 1")
        if not self.layers:
            raise ConfigError("layers: a model needs at least one layer; give a pattern such as 'M-M*-'")

    @classmethod
    def from_pattern(cls, pattern: str, **sizes: object) -> "ModelConfig":
        """A model whose layers of one kind are alike.

        Args:
            pattern: one letter per layer, e.g. "M-M-M*-".
            sizes: the fields of ModelConfig, and for each letter used its kind's spec, by the names mamba2, attention,
                mlp, moe; a spec is an instance or a mapping of its fields.

        Raises: ConfigError for an unknown letter or a kind without sizes.
        """
        specs: dict[str, LayerSpec] = {}
        for symbol, kind in KINDS.items():
            given = sizes.pop(SECTIONS[symbol], None)
            if isinstance(given, Mapping):
                given = from_dict(kind.spec, given, SECTIONS[symbol])
            if isinstance(given, LayerSpec):
                specs[symbol] = given
        for i, symbol in enumerate(pattern):
            if symbol not in KINDS:
                known = ", ".join(f"{k} {v.name}" for k, v in KINDS.items())
                raise ConfigError(f"pattern: unknown layer letter {symbol!r} at position {i}; known letters: {known}")
            if symbol not in specs:
                raise ConfigError(f"pattern: letter {symbol!r} needs the sizes of its kind: add [{SECTIONS[symbol]}]")
        return cls(layers=tuple(specs[symbol] for symbol in pattern), **sizes)  # type: ignore[arg-type]

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The published sizes of a named model; ConfigError naming the nearest one otherwise."""
        from plait.model.presets import PRESETS  # presets are built from this class

        if name not in PRESETS:
            near = nearest(name, PRESETS)
            raise ConfigError(f"preset {name!r} is unknown" + (f"; did you mean {near!r}?" if near else ""))
        return PRESETS[name]()

    @classmethod
    def from_dict(cls, data: Mapping[str, object], where: str = "") -> "ModelConfig":
        """Read the form of `to_dict`, or a pattern with one section of sizes per kind, or `preset = "name"`.

        Raises: ConfigError naming the field and the nearest known one.
        """
        at = f"{where}." if where else ""
        rest = dict(data)
        known = [f.name for f in fields(cls)] + ["pattern", "preset", *SECTIONS.values()]
        for key in rest:
            if key not in known:
                near = nearest(key, known)
                raise ConfigError(f"{at}{key}: unknown key" + (f"; did you mean {near!r}?" if near else ""))
        if "preset" in rest:
            config = cls.preset(str(rest.pop("preset")))
            return replace(config, **{k: _plain(cls, k, v, where) for k, v in rest.items()})
        layers = rest.pop("layers", None)
        sections = {name: rest.pop(name) for name in SECTIONS.values() if name in rest}
        pattern = rest.pop("pattern", None)
        plain = {k: _plain(cls, k, v, where) for k, v in rest.items()}
        for field in ("vocab_size", "d_model"):
            if field not in plain:
                raise ConfigError(f"{at}{field}: missing")
        if layers is not None:
            if not isinstance(layers, list | tuple):
                raise ConfigError(f"{at}layers={layers!r}: expected a list of layers")
            specs = tuple(_spec(item, f"{at}layers[{i}]") for i, item in enumerate(layers))
            return cls(layers=specs, **plain)  # type: ignore[arg-type]
        if not isinstance(pattern, str):
            raise ConfigError(f"{at}pattern: give a pattern such as 'M-M*-', or layers, or a preset")
        return cls.from_pattern(pattern, **sections, **plain)

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready form that `from_dict` reads back: the pattern form where layers of a kind are alike."""
        data = {f.name: to_dict(getattr(self, f.name)) for f in fields(self) if f.name != "layers"}
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

    def runs(self) -> list[tuple[LayerSpec, int]]:
        """Distinct specs in order of first use, with how many layers have each."""
        ordered = sorted(self.layers, key=lambda spec: self.layers.index(spec))
        return [(spec, len(list(group))) for spec, group in groupby(ordered)]

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


SECTIONS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}


def _present(spec: LayerSpec) -> dict[str, object]:
    return {k: v for k, v in to_dict(spec).items() if v is not None}


def _spec(item: object, where: str) -> LayerSpec:
    if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
        raise ConfigError(f"{where}: expected a table with kind one of {', '.join(KINDS)}; got {item!r}")
    sizes = {k: v for k, v in item.items() if k != "kind"}
    return from_dict(KINDS[str(item["kind"])].spec, sizes, where)


def _plain(cls: type[ModelConfig], key: str, value: object, where: str) -> object:
    """One plain field through the strict reader, so that its type is checked."""
    return getattr(from_dict(_PlainFields, {key: value}, where), key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlainFields:
    """The fields of ModelConfig that are not layers, for checking their types one at a time."""

    name: str = ""
    family: str = ""
    vocab_size: int = 1
    d_model: int = 1
    norm_eps: float = 1e-5
    ties_embeddings: bool = False
    residual_in_fp32: bool = False
    max_context: int = 1
    init_std: float = 0.02
    recipe: str = ""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
