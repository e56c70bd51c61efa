"""A sweep as a file: one training recipe, what varies, and the runs that follow from it.

base = "base.toml"                      the training recipe, beside this file; or all of it under [settings]
baseline = "bf16"                       the method that others are compared with, pair by pair of equal seeds
reference = "nvfp4"                     a second one, for ablations of it
find = "largest stable"                 go on between rates until the largest stable one is known
[settings]                              laid over the base in all runs, for example run.steps = 400
[axes]                                  recipe, seed and lr are short for precision, seed and run.schedule.peak;
recipe = ["bf16", "nvfp4"]              any other setting goes by its dotted name in quotes
seed = [0, 1, 2]
[variants.qk_norm]                      settings that belong together; all of them, or those that `axes.variant` names
"model.attention.qk_norm" = true

A run is one choice on each axis. Its method is all of them but the seed and the learning rate.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from plait.cli.recipe import TrainRecipe
from plait.config import ConfigError, from_dict, load, nearest
from plait.train.checkpoints import flatten

SHORT = {"recipe": "precision", "seed": "seed", "lr": "run.schedule.peak"}
SEED, LR = SHORT["seed"], SHORT["lr"]
# the only axis that is no setting
VARIANT = "variant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stable:
    """Which learning rates count as stable, and how closely the largest is looked for.

    worse: the final loss of every seed is within so many nats of the best rate's. within: the largest stable and the
    smallest unstable rate differ by at most this factor. probes: rates to try for a method, at most.
    """

    worse: float = 0.5
    within: float = 1.3
    probes: int = 4

    def __post_init__(self) -> None:
        if not self.worse > 0:
            raise ValueError(f"worse={self.worse}: must be above 0 nats")
        if not self.within > 1:
            raise ValueError(f"within={self.within}: a factor between two rates, above 1")
        if self.probes < 0:
            raise ValueError(f"probes={self.probes}: must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All of a sweep; see the file. title, about: of the page. keep_weights: leave them in the runs' folders.

    vocab_size: of the vocabulary that --text trains, at most.
    """

    base: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = ""
    reference: str = ""
    find: Literal["nothing", "largest stable"] = "nothing"
    stable: Stable = field(default_factory=Stable)
    title: str = ""
    about: str = ""
    vocab_size: int = 2048
    keep_weights: bool = False

    def __post_init__(self) -> None:
        for name, values in self.axes.items():
            _check_axis(name, values)
        _check_variants(self.axes.get(VARIANT), self.variants)
        if not self.axes and not self.variants:
            raise ValueError("nothing varies; add [axes] with for example seed = [0, 1, 2], or [variants.NAME]")
        if self.find == "largest stable" and len(self.axes.get("lr", self.axes.get(LR, ()))) < 2:
            raise ValueError('find="largest stable" needs at least two learning rates; add axes.lr = [1e-3, 1e-2]')
        keys = [SHORT.get(name, name) for name in self.axes]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"axes name {', '.join(twice)} twice; keep one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run. name: of its folder. method: as people read it. lr: None where it does not vary. settings: a recipe."""

    name: str
    method: str
    seed: int
    lr: float | None
    settings: dict[str, Any]

    def recipe(self) -> TrainRecipe:
        """The settings, read; raises ConfigError."""
        return from_dict(TrainRecipe, self.settings)

    def at(self, lr: float) -> "Trial":
        """The same run at another learning rate."""
        return replace(self, name=_name(self.method, lr, self.seed), lr=lr, settings=laid(self.settings, {LR: lr}))


def read(path: Path, words: Sequence[str] = ()) -> Sweep:
    """Read a sweep; `words` change it before it is checked.

    Raises: ConfigError naming field, value and fix; OSError if the file cannot be read.
    """
    sweep = load(Sweep, path, words)
    return sweep if sweep.base is None else replace(sweep, base=path.parent / sweep.base)


def trials(sweep: Sweep) -> list[Trial]:
    """All runs of the table, the first seed of everything first.

    Raises: ConfigError naming the axis, variant or run whose settings are wrong, and a baseline that no run has.
    """
    base: dict[str, Any] = {} if sweep.base is None else load(_Table, sweep.base).data
    base = laid(base, flatten(sweep.settings))
    axes = {SHORT.get(name, name): values for name, values in sweep.axes.items()}
    if sweep.variants:
        axes.setdefault(VARIANT, list(sweep.variants))
    # several seeds of one thing tell less than one seed of everything, when the table is not finished
    order = sorted(axes, key=lambda key: (key != SEED, key == VARIANT))
    # what is the same in all runs is no part of a method's name
    named = [key for key in order if key not in (SEED, LR)]
    named = [key for key in named if len(axes[key]) > 1] or named
    found = [
        _trial(base, dict(zip(order, chosen, strict=True)), sweep.variants, named)
        for chosen in itertools.product(*(axes[key] for key in order))
    ]
    for trial in found:
        _check_settings(trial, sweep)
    _check_different(found)
    methods = dict.fromkeys(trial.method for trial in found)
    for name in ("baseline", "reference"):
        wanted = getattr(sweep, name)
        if wanted and wanted not in methods:
            close = nearest(wanted, methods)
            hint = f'did you mean "{close}"?' if close else f"methods: {', '.join(methods)}"
            raise ConfigError(f'{name}="{wanted}" is not among the runs; {hint}')
    return found


def laid(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables with values put at dotted names."""
    copy = {key: laid(value, {}) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for name, value in changes.items():
        *path, last = name.split(".")
        here = copy
        for part in path:
            if not isinstance(here.get(part), dict):
                # a word may stand where a table can: precision = "bf16", [precision]
                here[part] = {}
            here = here[part]
        here[last] = value
    # both say how long a run is, and what is laid on top counts
    if "run.steps" in changes and "tokens" not in changes:
        copy.pop("tokens", None)
    elif "tokens" in changes and "run.steps" not in changes and isinstance(run := copy.get("run"), dict):
        run.pop("steps", None)
    return copy


@dataclass(frozen=True, slots=True)
class _Table:
    """Settings as they stand in the file."""

    data: dict[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "_Table":
        return cls(dict(data))


def _trial(
    base: dict[str, Any], chosen: dict[str, Any], variants: dict[str, dict[str, Any]], named: Sequence[str]
) -> Trial:
    changes = {key: value for key, value in chosen.items() if key != VARIANT}
    variant = flatten(variants[chosen[VARIANT]]) if VARIANT in chosen else {}
    for key in variant:
        if key in changes:
            raise ConfigError(f'"{key}" is set by the axis and by variants.{chosen[VARIANT]}; keep one of them')
    words = [_word(key, chosen[key]) for key in named]
    settings = laid(base, {**variant, **changes})
    seed, lr = settings.get("seed", 0), chosen.get(LR)
    method = ", ".join(words) or "base"
    return Trial(name=_name(method, lr, seed), method=method, seed=seed, lr=lr, settings=settings)


def _name(method: str, lr: float | None, seed: int) -> str:
    slug = re.sub(r"[^a-z0-9._=+-]+", "-", method.lower()).strip("-.") or "method"
    return slug + (f"-lr{lr:g}" if lr is not None else "") + f"-seed{seed}"


def _word(key: str, value: object) -> str:
    if key == VARIANT:
        return str(value)
    # a recipe in a file goes by the file's name
    word = Path(value).stem if isinstance(value, str) and value.endswith((".toml", ".json")) else f"{value}"
    return word if key == SHORT["recipe"] else f"{key.rpartition('.')[2]}={word}"


def _check_axis(name: str, values: object) -> None:
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"axes.{name} = {values!r}: expected a list of values")
    if not values:
        raise ConfigError(f"axes.{name} is empty; give at least one value, or leave the axis out")
    for value in values:
        if not isinstance(value, (bool, int, float, str)):
            raise ConfigError(f"axes.{name} holds {value!r}; put settings that belong together into [variants.NAME]")
    if len(set(map(str, values))) < len(values):
        raise ConfigError(f"axes.{name} = {list(values)} holds a value twice; keep one")
    numbers = {"seed": int, "lr": float, **{SHORT[short]: kind for short, kind in (("seed", int), ("lr", float))}}
    for value in values:
        kind = numbers.get(name)
        if kind and (isinstance(value, (bool, str)) or (kind is int and not isinstance(value, int)) or not value >= 0):
            raise ConfigError(f"axes.{name} holds {value!r}; expected numbers from 0")


def _check_variants(named: Sequence[object] | None, variants: Mapping[str, object]) -> None:
    for name in named or ():
        if name not in variants:
            close = nearest(str(name), variants)
            hint = f'did you mean "{close}"?' if close else f"variants: {', '.join(variants) or 'none'}"
            raise ConfigError(f'axes.variant names "{name}", which no [variants] table describes; {hint}')


def _check_settings(trial: Trial, sweep: Sweep) -> None:
    try:
        trial.recipe()
    except ValueError as error:
        where = sweep.base or "settings"
        raise ConfigError(f"run {trial.name}: {error} (base: {where}, then [settings], variant and axes)") from None


def _check_different(found: Sequence[Trial]) -> None:
    """Refuse runs that would be the same run twice: a variant that changes nothing, or two of one name."""
    by_settings: dict[str, Trial] = {}
    by_name: dict[str, Trial] = {}
    for trial in found:
        twin = by_settings.setdefault(repr(sorted(flatten(trial.settings).items())), trial)
        if twin is not trial:
            raise ConfigError(
                f"runs {twin.name} and {trial.name} have the same settings; a variant changes nothing, take it out"
            )
        if by_name.setdefault(trial.name, trial) is not trial:
            raise ConfigError(f"two runs are called {trial.name}; give the variants or files other names")
