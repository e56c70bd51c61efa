"""Everything that decides what a compression comes to, as one record: the budget, the search, the distillation.

Read from TOML and from `key=value` words by `plait compress`; written into the report. Two jobs that are equal give
the same student, bit for bit, on the same machine (where its clock was measured: from the same measurements).
"""

from dataclasses import dataclass, field
from typing import Literal

from plait.compress.budget import Budget
from plait.compress.costs import Load
from plait.compress.distill import Rows
from plait.compress.local import Lessons
from plait.compress.numbers import Numbers
from plait.compress.replace import Menu
from plait.train.optim import Optim
from plait.train.schedule import Schedule

# the order in which the stages of a compression run
STAGES = ("profile", "score", "library", "search", "realise", "answers", "short", "choose", "distil", "extend")
STAGES += ("verify", "elastic", "alone", "compare")
BASELINES = ("depth", "width", "magnitude", "random")
# learning rate times model width: 1e-4 at a width of 4096, and never more than MOST_LR
LR_WIDTH, MOST_LR = 0.4, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """batches: of calibration text for the width axes. layer_batches: of them for removing layers. rounds: of the
    iterative removal. layers_by: how layers are compared (layers.py): "mse" of logits, "input" of the head's input, or
    "loss", the logarithm of perplexity's ratio, which costs the head once more for every layer.
    """

    batches: int = 32
    layer_batches: int = 4
    rounds: int = 1
    layers_by: Literal["mse", "input", "loss"] = "mse"

    def __post_init__(self) -> None:
        for name in ("batches", "layer_batches", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far a grid goes from the teacher. depth: share of the layers of a kind that may go. width: share of an axis
    that may go. steps: values on each axis below the teacher's own.
    """

    depth: float = 0.3
    width: float = 0.5
    steps: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.depth < 1 and 0 <= self.width < 1 and self.steps >= 1):
            raise ValueError(
                f"depth={self.depth}, width={self.width}, steps={self.steps}: shares below 1, and at least one step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Long:
    """A last phase on longer rows. rows: how they are cut. share: of the tokens, taken from the end of the run."""

    rows: Rows
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share}: the longer phase's part of the tokens lies between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How students learn.

    tokens: of the student that is chosen, in all. short: tokens of each candidate before the choice, which are the
    first of these; None is a tenth. share, temperature: of the divergence (train/distill.py). streams: what the
    teacher's residual streams weigh. top: likeliest tokens of each answer to keep on the disk, so that the teacher
    leaves memory; 0 keeps the teacher. teacher: precision that it is held in, such as "int8"; None as it is stored.
    lr: the highest; None is 0.4 over the student's width, at most 1e-3. rows, long: batches.
    validation_batches: of held-out text. save_minutes, save_every: how often a run can be resumed from.
    """

    tokens: int = 1_000_000
    short: int | None = None
    share: float = 1.0
    temperature: float = 1.0
    streams: float = 0.0
    top: int = 0
    teacher: str | None = None
    precision: str = "bf16"
    lr: float | None = None
    optim: Optim = field(default_factory=Optim)
    rows: Rows = field(default_factory=Rows)
    long: Long | None = None
    validation_batches: int = 32
    save_minutes: float = 10.0
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.tokens < self.rows.tokens:
            raise ValueError(f"tokens={self.tokens}: must be at least one step's {self.rows.tokens}")
        if self.short is not None and not 0 < self.short <= self.tokens:
            raise ValueError(f"short={self.short}: must be above 0 and at most tokens={self.tokens}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the divergence's part of the loss lies between 0 and 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be above 0; 1 compares the models as they are")
        if self.streams < 0 or self.top < 0 or self.validation_batches < 1:
            raise ValueError("streams and top must be 0 or more, validation_batches at least 1")
        if self.top and self.streams:
            raise ValueError(f"top={self.top} with streams={self.streams}: answers on a disk hold no streams; drop one")
        if self.lr is not None and not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr}: must lie between 0 and 1, for example 1e-3")

    @property
    def short_steps(self) -> int:
        """Updates of each candidate before the choice."""
        tokens = self.tokens / 10 if self.short is None else self.short
        return max(1, min(round(tokens / self.rows.tokens), self.main_steps))

    @property
    def long_steps(self) -> int:
        """Updates of the phase on longer rows."""
        return 0 if self.long is None else max(1, round(self.tokens * self.long.share / self.long.rows.tokens))

    @property
    def main_steps(self) -> int:
        """Updates before the longer rows, those before the choice included."""
        kept = self.tokens * (1.0 if self.long is None else 1 - self.long.share)
        return max(1, round(kept / self.rows.tokens))

    def peak(self, d_model: int) -> float:
        """The highest learning rate of a student of this width."""
        return min(MOST_LR, LR_WIDTH / d_model) if self.lr is None else self.lr

    def schedule(self, d_model: int, steps: int) -> Schedule:
        """Of a run of so many updates."""
        warmup = min(100, max(1, steps // 10))
        return Schedule(peak=self.peak(d_model), kind="cosine", warmup_steps=warmup, final_ratio=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A compression.

    method: "minipuzzle", a grid of uniform models, or "puzzle", a choice per layer. budget, load, numbers: what the
    student may cost, under which load and in which numbers. device: which machine tells times: a name, or "this".
    space: how far candidates are from the teacher. keep: candidates that are distilled before the choice. ranking:
    batches of text on which candidates are ranked. candidates: that are ranked, at most. menu, lessons: of Puzzle, what
    may stand in a layer's place and how it learns to.
    baselines: which are made too. full: distil them on as many tokens as the student.
    """

    method: Literal["minipuzzle", "puzzle"] = "minipuzzle"
    budget: Budget = field(default_factory=Budget)
    load: Load = field(default_factory=Load)
    numbers: Numbers = field(default_factory=Numbers)
    device: str = "a10g"
    reserve: int = 0
    space: Reach = field(default_factory=Reach)
    keep: int = 3
    ranking: int = 8
    candidates: int = 100
    baselines: tuple[str, ...] = BASELINES
    full: bool = False
    menu: Menu = field(default_factory=Menu)
    lessons: Lessons = field(default_factory=Lessons)
    scoring: Scoring = field(default_factory=Scoring)
    teaching: Teaching = field(default_factory=Teaching)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("keep", "ranking", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.reserve < 0 or not 0 <= self.seed < 2**63:
            raise ValueError(f"reserve={self.reserve}, seed={self.seed}: must be 0 or more")
        for name in self.baselines:
            if name not in (*BASELINES, "scratch"):
                raise ValueError(f"baselines: {name!r} is unknown; known: {', '.join((*BASELINES, 'scratch'))}")
