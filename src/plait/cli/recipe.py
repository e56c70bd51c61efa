"""A training run as a file: which model, which tokens, how long and how fast.

seed = 0                           of fresh weights and of the order of data
precision = "bf16"                 what products compute in; masters are float32. A recipe's name, the path of its TOML
                                   file, or a [precision] table with base, rules and switch (precision/reading.py)
[model]                            preset = "NAME", or a pattern with sizes, or checkpoint = "FOLDER"
[data]                             sources, rows and length of a batch, phases
[run]                              steps or tokens, [run.optim], [run.schedule], validation, checkpoints
objective = "next-token"           or "sft": sources are files of conversations, of which the answers are learnt
[sft]                              of "sft": reduction, tokenizer, share held out
[distill]                          teacher = "FOLDER": learn its next-token distributions; share, temperature, recipe
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plait.config import ConfigError, from_dict, read_fields
from plait.data.blend import Blend, Phase
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint
from plait.formats.native import MANIFEST
from plait.model.config import ModelConfig
from plait.precision.plain import BF16
from plait.precision.recipe import PrecisionRecipe
from plait.train.loop import TrainConfig
from plait.tune.sft import Reduction


@dataclass(frozen=True, slots=True)
class ModelTable:
    """The [model] table: `checkpoint = "FOLDER"` alone, or what ModelConfig reads; vocab_size may be left out."""

    settings: dict[str, object]

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "ModelTable":
        """Keep the table as it is, after finding what is wrong with it.

        Raises: ConfigError for an unknown key or a wrong value.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{data!r}: expected a table with preset, pattern or checkpoint")
        table = cls(dict(data))
        if "checkpoint" in data and len(data) > 1:
            raise ConfigError(
                f"checkpoint brings its own sizes; leave out {', '.join(k for k in data if k != 'checkpoint')}"
            )
        if "checkpoint" not in data:
            table.config(vocab_size=1)
        return table

    def to_dict(self) -> dict[str, object]:
        """The table."""
        return self.settings

    @property
    def checkpoint(self) -> Path | None:
        """The folder to start from, if any."""
        return Path(str(self.settings["checkpoint"])) if "checkpoint" in self.settings else None

    def config(self, vocab_size: int) -> ModelConfig:
        """The sizes; `vocab_size` is that of the data, for tables that leave it open.

        Raises: CheckpointError if the checkpoint cannot be read or its checksums do not fit.
        """
        if self.checkpoint is not None:
            # other formats record no checksums
            is_native = (self.checkpoint / MANIFEST).is_file()
            return Checkpoint.open(self.checkpoint, verify=is_native).config
        open_size = {} if {"preset", "vocab_size"} & set(self.settings) else {"vocab_size": vocab_size}
        return ModelConfig.from_dict({**open_size, **self.settings})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTable:
    """path: a folder that `plait tokenize` wrote, or one of token shards. weight: its share; None by its size."""

    path: Path
    weight: float | None = None

    def open(self) -> Dataset:
        """Its training tokens."""
        inner = self.path / "train"
        return Dataset.open(inner if (inner / "dataset.json").is_file() else self.path)

    def held_out(self) -> Dataset | None:
        """Its validation tokens, if it has any."""
        inner = self.path / "valid"
        return Dataset.open(inner) if (inner / "dataset.json").is_file() else None

    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer it was written with, if that is there."""
        places = (self.path / "tokenizer", self.path.parent / "tokenizer")
        return next((place for place in places if (place / "tokenizer.json").is_file()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """What is read.

    sources: by name. seq_len: tokens in a row. batch_size: rows of a step. accumulate: parts that a step is cut into,
    one in memory at a time. phases: other weights for stretches of the run. max_epochs: by source, or "*".
    validation_batches: how many batches of held-out tokens a validation takes. bad_batches: draws, counted from 0,
    whose tokens are replaced by random ones: an experiment on spikes.
    """

    sources: dict[str, SourceTable]
    seq_len: int = 512
    batch_size: int = 8
    accumulate: int = 1
    phases: tuple[Phase, ...] = ()
    max_epochs: dict[str, float] = field(default_factory=dict)
    validation_batches: int = 16
    bad_batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError('sources is empty; add [data.sources.NAME] with path = "FOLDER"')
        for name in ("seq_len", "batch_size", "accumulate", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if any(draw < 0 for draw in self.bad_batches):
            raise ValueError(f"bad_batches={list(self.bad_batches)}: draws are counted from 0")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        weights = [source.weight for source in self.sources.values()]
        if self.phases and any(weight is not None for weight in weights):
            raise ValueError("phases and weight of sources are both given; write the weights in the phases")
        if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
            raise ValueError("some sources have a weight and some do not; give all of them one, or none")

    def blend(self, datasets: Mapping[str, Dataset]) -> Blend:
        """How the sources are mixed; by tokens where nothing is said."""
        weights = {name: source.weight or 0.0 for name, source in self.sources.items()}
        if all(source.weight is None for source in self.sources.values()):
            weights = {name: float(data.n_tokens) for name, data in datasets.items()}
        phases = self.phases or Blend.of(weights).phases
        return Blend(phases=phases, max_epochs=self.max_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTTable:
    """How conversations are learnt from.

    reduction: "mean" over tokens, or a "sum" of a step or per "sequence" (plait/tune/sft.py). tokenizer: folder; None
    is the model's. held_out: share of the conversations to validate on.
    """

    reduction: Reduction = "mean"
    tokenizer: Path | None = None
    held_out: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: must be a share of the conversations, below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillTable:
    """teacher: folder of a checkpoint of the same vocabulary. share: of its divergence in the loss, the rest is plain
    cross-entropy. temperature: of both distributions. recipe: what the teacher is held and computed in, such as "int8"
    to save memory; None is what the model computes in.
    """

    teacher: Path
    share: float = 1.0
    temperature: float = 1.0
    recipe: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """All of a run; see the file. device: auto, cpu, cuda. In a file, `tokens` may stand instead of run.steps."""

    model: ModelTable
    data: DataTable
    run: TrainConfig
    precision: PrecisionRecipe = BF16
    device: str = "auto"
    seed: int = 0
    objective: Literal["next-token", "sft"] = "next-token"
    sft: SFTTable | None = None
    distill: DistillTable | None = None

    def __post_init__(self) -> None:
        if self.sft is not None and self.objective != "sft":
            raise ValueError(f'sft is given and objective="{self.objective}"; set objective="sft", or leave it out')
        data = self.data
        if self.objective == "sft" and (
            data.phases
            or data.max_epochs
            or data.bad_batches
            or any(s.weight is not None for s in data.sources.values())
        ):
            raise ValueError(
                'objective="sft" reads all conversations equally often; leave out phases, max_epochs, bad_batches and '
                "the weight of sources in data"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be at least 0 and below 2^63; any such number will do")

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "TrainRecipe":
        """Read the tables; `tokens` becomes steps.

        Raises: ConfigError naming field, value and fix.
        """
        run, tokens = data.get("run", {}), data.get("tokens")
        if tokens is not None and isinstance(run, Mapping):
            if "steps" in run:
                raise ConfigError(f"tokens={tokens} and run.steps={run['steps']} both say how long; give one of them")
            table = from_dict(DataTable, _table(data.get("data")), "data")
            per_step = table.seq_len * table.batch_size
            if type(tokens) is not int or tokens < per_step:
                raise ConfigError(f"tokens={tokens!r}: must be a number of at least one step's {per_step}")
            run = {**run, "steps": math.ceil(tokens / per_step)}
        rest = {key: value for key, value in data.items() if key not in ("tokens", "run")}
        return read_fields(cls, {**rest, "run": run})

    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that goes with the model, if there is one."""
        start = self.model.checkpoint
        if self.sft is not None and self.sft.tokenizer is not None:
            return self.sft.tokenizer
        if start is not None and (start / "tokenizer.json").is_file():
            return start
        return next((place for source in self.data.sources.values() if (place := source.tokenizer())), None)

    def check_tokens(self, config: ModelConfig, datasets: Mapping[str, Dataset]) -> None:
        """Refuse sources without tokens, and tokens that the model cannot take or that mean something else to it.

        Raises: ConfigError naming the source and, where it is about them, both vocabularies.
        """
        for name, data in datasets.items():
            if not data.n_tokens:
                raise ConfigError(f"data.sources.{name}: {data.folder} holds no tokens; tokenize files that hold text")
            if vocab_size(data) > config.vocab_size:
                raise ConfigError(
                    f"data.sources.{name}: its vocabulary has {vocab_size(data)} tokens, the model's embedding "
                    f"{config.vocab_size} rows; set model.vocab_size to at least {vocab_size(data)}, or tokenize "
                    "with the model's tokenizer"
                )
        hashes = {str(data.record["vocabulary_hash"]): f"data.sources.{name}" for name, data in datasets.items()}
        start = self.model.checkpoint
        if start is not None and (start / "tokenizer.json").is_file():
            from plait.text.tokenizer import Tokenizer  # slow to open, and rarely needed

            hashes[Tokenizer.open(start).vocabulary_hash] = "model.checkpoint"
        hashes.pop("", None)
        if len(hashes) > 1:
            raise ConfigError(
                f"{' and '.join(hashes.values())} have different vocabularies; tokenize with the same tokenizer"
            )


def vocab_size(data: Dataset) -> int:
    """Ids of a dataset run below it."""
    return int(str(data.record["vocab_size"]))


def _table(data: object) -> Mapping[str, object]:
    return data if isinstance(data, Mapping) else {}
