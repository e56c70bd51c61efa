"""The training loop: one for every objective, resumable at any moment, bit for bit.

    until all updates are made:  batches -> update -> facts -> validation -> checkpoint

What a step computes depends on the weights, the optimiser's state, the step and the number of skipped steps, and on
nothing else: a run that was killed and resumed ends with the weights of one that was not (same machine and threads).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from plait.dist import parallel
from plait.model.hybrid import Hybrid
from plait.train.checkpoints import Checkpoints, Identity, Progress, flatten
from plait.train.interrupt import Interrupts
from plait.train.lock import alone
from plait.train.metrics import JsonLines, Observer, StepFacts, TensorBoard, peak_flops_per_s, step_flops, write_whole
from plait.train.objective import Objective, Size, mean_loss
from plait.train.optim import Optim, Optimizers
from plait.train.prefetch import draws
from plait.train.schedule import Schedule
from plait.train.step import Update, update

B = TypeVar("B")
log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a run.

    steps: updates to make. optim, schedule: see there. validate_every: steps
    between validations, 0 only at the end. save_every, save_minutes: when checkpoints are written, 0 never by this
    rule; one is always written at the end and when the run is asked to stop. keep: newest checkpoints that stay.
    max_skipped: steps in a row with a loss or gradient that is not finite before the run gives up.
    recompute: run blocks again in the backward pass to save memory. compile: torch.compile the blocks.
    log_every: steps between lines of metrics.jsonl. tensorboard: write event files too.
    """

    steps: int
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    validate_every: int = 0
    save_every: int = 0
    save_minutes: float = 10.0
    keep: int = 3
    max_skipped: int = 20
    recompute: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "keep", "max_skipped", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("validate_every", "save_every", "save_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more; 0 turns it off")
        self.schedule.lengths(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    steps, skipped, tokens: of the whole run, earlier processes included. loss: of the last batch, nats per token.
    validation_loss: after the last step, None without validation data. seconds, tokens_per_s: of this process;
    steps only, without validation and saving. checkpoint: the last one written, None without a folder.
    """

    steps: int
    skipped: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    seconds: float
    tokens_per_s: float
    checkpoint: Path | None


def train(
    model: Hybrid,
    objective: Objective[B],
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: Literal["auto", "never"] = "auto",
    start: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
    tokenizer: Path | None = None,
    on_step: Callable[[StepFacts], None] | None = None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train a model in place.

    Args:
        model: float32 masters, on its device.
        objective: batches and loss.
        config: settings.
        out: folder for metrics.jsonl and checkpoints/; None writes nothing and cannot resume.
        resume: "auto" continues from the newest checkpoint in `out`; "never" refuses a folder that has one.
        start: what else decided the starting weights, JSON-ready, e.g. their seed; compared when resuming.
        settings: JSON-ready, written to recipe.json in `out` once it is clear that the run may begin.
        tokenizer: folder whose tokenizer goes into every checkpoint; None takes the one the model was loaded with.
        on_step: called with the facts of every step, skipped ones included.
        observers: told the same, and when the run ends.

    Raises: ValueError for settings that do not fit, a checkpoint of another run, or a folder in which another process
        trains; DivergedError; OSError naming the file if something cannot be written; KeyboardInterrupt after Ctrl-C
        or SIGTERM, when the state is saved.
    """
    if config.recompute:
        parallel.recompute(model)
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(alone(out))
        run = _Run(model, objective, config, out, start or {}, tokenizer)
        run.resume(resume)
        for observer in [*run.writers(settings), *observers]:
            stack.callback(observer.close)
            run.observers.append(observer.step)
        if on_step is not None:
            run.observers.append(on_step)
        interrupts = stack.enter_context(Interrupts())
        coming = stack.enter_context(draws(objective, run.progress.step + run.progress.skipped))
        while run.progress.step < config.steps:
            run.step(*next(coming))
            # who asks during the last step gets the whole run
            stops = bool(interrupts.asked) and run.progress.step < config.steps
            if run.is_save_due() or stops:
                run.save()
            if stops:
                where = f"saved in {run.last_saved}" if run.last_saved else "nothing is saved without a folder"
                log.info("stopped by %s after step %d; %s", interrupts.asked, run.progress.step, where)
                raise KeyboardInterrupt(f"stopped by {interrupts.asked} after step {run.progress.step}; {where}")
    return run.outcome()


class _Run(Generic[B]):
    """What one call of `train` holds together."""

    def __init__(
        self,
        model: Hybrid,
        objective: Objective[B],
        config: TrainConfig,
        out: Path | None,
        start: Mapping[str, object],
        tokenizer: Path | None,
    ) -> None:
        self.model, self.objective, self.config, self.out = model, objective, config, out
        self.optimizers = Optimizers(model, config.optim)
        self.validation = objective.validation()
        self.progress = Progress()
        self.observers: list[Callable[[StepFacts], None]] = []
        self.checkpoints = None if out is None else Checkpoints(out / "checkpoints", config.keep, tokenizer)
        self.last_saved: Path | None = None
        is_compiled = parallel.compile_blocks(model, config.compile)
        settings = {
            "model": model.config.to_dict(),
            "precision": model.recipe.name,
            "optim": asdict(config.optim),
            "compiled": is_compiled,
            "data": objective.identity(),
            "start": dict(start),
        }
        self.identity = Identity(settings=flatten(settings), schedule=config.schedule, steps=config.steps)
        self.seconds, self.tokens, self.pace = 0.0, 0, 0.0
        self.saved_at = self.stepped_at = time.monotonic()
        for line in self.optimizers.describe():
            log.info("%s", line)

    def resume(self, how: Literal["auto", "never"]) -> None:
        """Continue from the newest checkpoint, if there is one and it may be used."""
        if self.checkpoints is None:
            return
        self.checkpoints.sweep()
        if how == "never":
            if (found := self.checkpoints.latest()) is not None:
                raise ValueError(f'resume="never", but {found} exists; choose another folder, or resume="auto"')
        elif (found := self.checkpoints.resume(self.model, self.optimizers, self.identity)) is not None:
            self.progress, extra = found
            self.objective.load_state(extra)
            self.last_saved = self.checkpoints.latest()

    def writers(self, settings: Mapping[str, object] | None) -> list[Observer]:
        """Files that every run with a folder writes."""
        if self.out is None:
            return []
        if settings is not None:
            write_whole(self.out / "recipe.json", json.dumps(settings, indent=1) + "\n")
        writers: list[Observer] = [
            JsonLines(self.out / "metrics.jsonl", after=self.progress.step, every=self.config.log_every)
        ]
        if self.config.tensorboard:
            writers.append(TensorBoard(self.out / "tensorboard", after=self.progress.step))
        return writers

    def step(self, batches: Sequence[B], sizes: Sequence[Size]) -> None:
        """One update, what it measured, and validation when it is due."""
        counted = sum(size.counted for size in sizes)
        progress, config = self.progress, self.config
        if not counted:
            raise ValueError(
                f"the batch of step {progress.step + 1} counts no token; look at the loss mask of the data"
            )
        lr = config.schedule.lr(progress.step, config.steps)
        begin = time.perf_counter()
        result = update(self.model, self.objective, batches, counted, self.optimizers, lr)
        seconds = time.perf_counter() - begin
        if result.applied:
            progress.step += 1
            progress.in_a_row = 0
            progress.tokens += sum(size.tokens for size in sizes)
            progress.loss = result.loss
        else:
            progress.skipped += 1
            progress.in_a_row += 1
        facts = self._facts(result, lr, sizes, seconds)
        for observer in self.observers:
            observer(facts)
        if progress.in_a_row >= config.max_skipped:
            good = f"the last good checkpoint is {self.last_saved}" if self.last_saved else "there is no checkpoint"
            raise DivergedError(
                f"{progress.in_a_row} steps in a row had a loss or gradient that is not finite; {good}. "
                "Lower schedule.peak or look at the data"
            )

    def _facts(self, result: Update, lr: float, sizes: Sequence[Size], seconds: float) -> StepFacts:
        tokens, progress, config = sum(size.tokens for size in sizes), self.progress, self.config
        rate = step_flops(self.model.config, tokens, sum(size.keys for size in sizes)) / seconds
        validation = None
        every = config.validate_every
        if result.applied and ((every and progress.step % every == 0) or progress.step == config.steps):
            validation = progress.validation_loss = self._validate()
        now = time.monotonic()
        passed, self.stepped_at = now - self.stepped_at, now
        self.pace = passed if not self.tokens else 0.9 * self.pace + 0.1 * passed
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        return StepFacts(
            step=progress.step,
            steps=config.steps,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=progress.tokens,
            tokens_per_s=tokens / seconds,
            flops_per_s=rate,
            utilisation=rate / peak_flops_per_s(self.model.device, self.model.recipe.compute),
            time_left_s=self.pace * (config.steps - progress.step),
            skipped=progress.skipped,
            applied=result.applied,
            validation_loss=validation,
            metrics=result.metrics,
        )

    def _validate(self) -> float | None:
        return mean_loss(self.model, self.objective, self.validation) if self.validation else None

    def is_save_due(self) -> bool:
        """Whether the settings ask for a checkpoint after this step."""
        step, config = self.progress.step, self.config
        if step == config.steps or (config.save_every and step % config.save_every == 0 and not self.progress.in_a_row):
            return True
        return bool(config.save_minutes) and time.monotonic() - self.saved_at >= 60 * config.save_minutes

    def save(self) -> None:
        """Write a checkpoint, where there is a folder."""
        if self.checkpoints is not None:
            extra = self.objective.state()
            self.last_saved = self.checkpoints.save(self.model, self.optimizers, self.progress, self.identity, extra)
        self.saved_at = time.monotonic()

    def outcome(self) -> Outcome:
        """The run so far."""
        progress = self.progress
        return Outcome(
            steps=progress.step,
            skipped=progress.skipped,
            tokens=progress.tokens,
            loss=progress.loss,
            validation_loss=progress.validation_loss,
            seconds=self.seconds,
            tokens_per_s=self.tokens / self.seconds if self.seconds else 0.0,
            checkpoint=self.last_saved,
        )
