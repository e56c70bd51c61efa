"""Distils a pruned model on a stretch of the data, in the one training loop, and leaves it as a checkpoint.

    FOLDER/model/           the student, native format, float32 masters
    FOLDER/outcome.json     steps, tokens, loss, validation loss
    FOLDER/run/             metrics.jsonl of the training; its checkpoints while it is not finished

A run draws its batches from a numbered sequence, of which the candidates of a search read the beginning and the chosen
one what follows: no token is read twice as long as there are new ones.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from plait.compress.plan import Plan
from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint, load, save
from plait.model.hybrid import Hybrid
from plait.train.distill import Streams
from plait.train.loop import TrainConfig, train
from plait.train.metrics import Observer, write_whole
from plait.train.objective import Loss, Objective, Size
from plait.train.pretrain import NextToken

B = TypeVar("B")
MODEL, OUTCOME, RUN = "model", "outcome.json", "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How tokens are cut into batches. seq_len: tokens of a row. batch_size: rows of a step. accumulate: its parts."""

    seq_len: int = 512
    batch_size: int = 8
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq_len * self.batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Tokens to learn from and tokens held out, of the teacher's vocabulary."""

    train: Dataset
    valid: Dataset

    def identity(self) -> dict[str, object]:
        """What they are, JSON-ready."""
        return {"train": _shards(self.train), "valid": _shards(self.valid)}

    def objective(self, rows: Rows, *, seed: int, validation_batches: int) -> NextToken:
        """Next tokens of the text in an order drawn from the seed; the first held-out batches validate."""
        loader = self.loader(rows, seed=seed)
        valid = Loader(
            {"text": self.valid},
            batch_size=max(1, rows.batch_size // rows.accumulate),
            seq_len=rows.seq_len,
            seed=0,
            repeat=False,
        )
        identity = {**self.identity(), "seq_len": rows.seq_len, "batch_size": rows.batch_size, "seed": seed}
        return NextToken(
            loader,
            accumulate=rows.accumulate,
            validation=valid,
            validation_batches=validation_batches,
            identity=identity,
        )

    def loader(self, rows: Rows, *, seed: int) -> Loader:
        """Batches of the training tokens."""
        return Loader({"text": self.train}, batch_size=rows.batch_size, seq_len=rows.seq_len, seed=seed)


class Later(Generic[B]):
    """An objective from its draw number `first` on."""

    def __init__(self, objective: Objective[B], first: int) -> None:
        self.objective, self.first = objective, first

    def batches(self, draw: int) -> Sequence[B]:
        """See Objective."""
        return self.objective.batches(draw + self.first)

    def size(self, batch: B) -> Size:
        """See Objective."""
        return self.objective.size(batch)

    def loss(self, model: Hybrid, batch: B, scale: float) -> Loss:
        """See Objective."""
        return self.objective.loss(model, batch, scale)

    def sample(self, batch: B) -> tuple[Tensor, Tensor | None]:
        """See Objective."""
        return self.objective.sample(batch)

    def validation(self) -> Sequence[B]:
        """See Objective."""
        return self.objective.validation()

    def identity(self) -> dict[str, object]:
        """See Objective."""
        return {**self.objective.identity(), "first": self.first}

    def state(self) -> dict[str, object]:
        """See Objective."""
        return self.objective.state()

    def load_state(self, state: dict[str, object]) -> None:
        """See Objective."""
        self.objective.load_state(state)


def distil(
    folder: Path,
    start: Callable[[], Hybrid],
    objective: Objective[B],
    config: TrainConfig,
    *,
    name: str,
    seed: int,
    tokenizer: Path | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, object]:
    """Train a student, or go on where it was stopped; the same bits in either case.

    Args:
        folder: to fill; see the file.
        start: gives the model as it begins, in float32 masters.
        objective: a distillation, or plain text for a baseline.
        config: of the training loop.
        name: what decides the starting weights, compared when resuming.
        seed: of random rounding.
        tokenizer: folder; goes along.
        observers: told of every step.

    Returns: the outcome as it is written.
    """
    if (folder / OUTCOME).is_file() and (folder / MODEL).is_dir():
        return outcome_of(folder)
    model = start()
    found = train(
        model,
        objective,
        config,
        folder / RUN,
        start={"student": name},
        seed=seed,
        tokenizer=tokenizer,
        observers=observers,
    )
    save(model, folder / MODEL, format="native", overwrite=True, tokenizer=tokenizer)
    facts = {
        "steps": found.steps,
        "skipped": found.skipped,
        "tokens": found.tokens,
        "loss": found.loss,
        "validation_loss": found.validation_loss,
    }
    write_whole(folder / OUTCOME, json.dumps(facts, indent=1) + "\n")
    # only after the result is whole
    shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)
    return facts


def outcome_of(folder: Path) -> dict[str, object]:
    """What a distillation in this folder came to."""
    return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))


def student(folder: Path, recipe: str, device: str) -> Hybrid:
    """The model in a stage's folder, for training: float32 masters under the recipe."""
    return load(folder / MODEL, device=device, dtype="float32", recipe=recipe)


def keep(checkpoint: Checkpoint, folder: Path, tokenizer: Path | None) -> None:
    """Write a pruned checkpoint into a stage's folder, in float32: what training begins with."""
    model = checkpoint.model(device="cpu", dtype="float32", verify=False)
    save(model, folder / MODEL, format="native", overwrite=True, tokenizer=tokenizer)


def curve_of(folder: Path) -> list[tuple[int, float]]:
    """(tokens, training loss) of every step of a distillation."""
    path = folder / RUN / "metrics.jsonl"
    rows: list[Mapping[str, float]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(int(row["tokens"]), float(row["loss"])) for row in rows if row.get("applied", True)]


def streams_of(plan: Plan, n_layers: int, channels: tuple[int, ...] | None, weight: float) -> Streams:
    """Which streams of student and teacher belong together: what each layer of the student is to hand on.

    The layer after student layer i is the teacher's kept[i + 1], which is used to the stream after all teacher layers
    before it, those that were dropped included; the last one meets the teacher's last stream.
    """
    ends = (*plan.kept[1:], n_layers)
    return Streams(weight=weight, pairs=tuple((i + 1, end) for i, end in enumerate(ends)), channels=channels)


def _shards(data: Dataset) -> list[object]:
    shards = data.record["shards"]
    assert isinstance(shards, list)
    return [shard["tokens_sha256"] for shard in shards]
