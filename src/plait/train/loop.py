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
from plait.train.spikes import TRIES, Snapshot, Spikes, Watch
from plait.train.step import Update, update
from plait.train.telemetry import Telemetry

B = TypeVar("B")
log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite, or the loss went up and stayed there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a run.

    steps: updates to make. optim, schedule: see there. validate_every: steps
    between validations, 0 only at the end. save_every, save_minutes: when checkpoints are written, 0 never by this
    rule; one is always written at the end and when the run is asked to stop. keep: newest checkpoints that stay.
    max_skipped: steps in a row with a loss or gradient that is not finite before the run gives up. spikes: what happens
    to steps whose loss or gradient is finite and far too large, and to a run that diverges.
    recompute: run blocks again in the backward pass to save memory. compile: torch.compile the blocks.
    log_every: steps between lines of metrics.jsonl. tensorboard: write event files too. telemetry_every: steps between
    looks inside the model, see train/telemetry.py; 0 never.
    """

    steps: int
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    validate_every: int = 0
    save_every: int = 0
    save_minutes: float = 10.0
    keep: int = 3
    max_skipped: int = 20
    spikes: Spikes = field(default_factory=Spikes)
    recompute: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 1
    tensorboard: bool = False
    telemetry_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "keep", "max_skipped", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("validate_every", "save_every", "save_minutes", "telemetry_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more; 0 turns it off")
        self.schedule.lengths(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    steps, skipped, tokens, spikes, rollbacks: of the whole run, earlier processes included. loss: of the last batch,
    nats per token. validation_loss: after the last step, None without validation data. seconds, tokens_per_s: of this
    process; steps only, without validation and saving. checkpoint: the last one written, None without a folder.
    """

    steps: int
    skipped: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    seconds: float
    tokens_per_s: float
    checkpoint: Path | None
    spikes: int = 0
    rollbacks: int = 0


def train(
    model: Hybrid,
    objective: Objective[B],
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: Literal["auto", "never"] = "auto",
    start: Mapping[str, object] | None = None,
    seed: int = 0,
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
        out: folder for metrics.jsonl, telemetry.jsonl and checkpoints/; None writes nothing and cannot resume.
        resume: "auto" continues from the newest checkpoint in `out`; "never" refuses a folder that has one.
        start: what else decided the starting weights, JSON-ready, e.g. their seed; compared when resuming.
        seed: of random rounding, where the model's precision has any.
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
        products = model.check_precision()
        if products.native or products.emulated:
            log.info(
                "precision %s: of %d matrix products of linear layers, %d on tensor cores in few bits, %d emulated",
                *(model.recipe.name, products.high + products.native + products.emulated),
                *(products.native, products.emulated),
            )
        run = _Run(model, objective, config, out, start or {}, seed, tokenizer)
        run.resume(resume)
        for observer in [*run.writers(settings), *observers]:
            stack.callback(observer.close)
            run.observers.append(observer.step)
        if run.telemetry is not None:
            stack.callback(run.telemetry.close)
        if on_step is not None:
            run.observers.append(on_step)
        interrupts = stack.enter_context(Interrupts())
        coming = stack.enter_context(draws(objective, run.progress.draws))
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
        seed: int,
        tokenizer: Path | None,
    ) -> None:
        self.model, self.objective, self.config, self.out, self.seed = model, objective, config, out, seed
        self.optimizers = Optimizers(model, config.optim)
        self.validation = objective.validation()
        self.progress = Progress()
        self.watch = Watch(config.spikes)
        self.snapshot: Snapshot | None = None
        self.telemetry: Telemetry | None = None
        self.observers: list[Callable[[StepFacts], None]] = []
        self.checkpoints = None if out is None else Checkpoints(out / "checkpoints", config.keep, tokenizer)
        self.last_saved: Path | None = None
        is_compiled = parallel.compile_blocks(model, config.compile)
        settings = {
            "model": model.config.to_dict(),
            **model.recipe.decides(seed, config.steps),
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
            self.progress, extra, tensors = found
            self.objective.load_state(extra)
            self.watch = Watch(self.config.spikes, self.progress.watch)
            if "snapshot" in tensors and (facts := self.progress.snapshot):
                self.snapshot = Snapshot.load(tensors["snapshot"], facts, self.model.state_dict())
            self.last_saved = self.checkpoints.latest()

    def writers(self, settings: Mapping[str, object] | None) -> list[Observer]:
        """Files that every run with a folder writes."""
        if self.out is None:
            return []
        if settings is not None:
            write_whole(self.out / "recipe.json", json.dumps(settings, indent=1) + "\n")
        writers: list[Observer] = [
            JsonLines(self.out / "metrics.jsonl", after=self.progress.draws, every=self.config.log_every)
        ]
        if self.config.telemetry_every:
            self.telemetry = Telemetry(self.out / "telemetry.jsonl", after=self.progress.draws)
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
        decay = config.schedule.weight_decay(progress.step, config.steps)
        weight = sum(size.counted if size.weight is None else size.weight for size in sizes)
        moment = self.model.moment
        moment.seed, moment.draw = self.seed, progress.draws
        moment.is_late = self.model.recipe.is_late(progress.step, config.steps)
        moment.share = self.model.recipe.share(progress.step, config.steps)
        begin = time.perf_counter()
        self._keep_good_state()
        how = (self.optimizers, lr, self._accepts)
        result = update(self.model, self.objective, batches, counted, *how, decay=decay, weight=weight)
        seconds = time.perf_counter() - begin
        if result.applied:
            progress.step += 1
            progress.in_a_row = 0
            progress.tokens += sum(size.tokens for size in sizes)
            progress.loss = result.loss
            if self.telemetry is not None and progress.step % config.telemetry_every == 0:
                looked = self.objective.sample(batches[0])
                self.telemetry.write(self.model, *looked, step=progress.step, skipped=progress.skipped)
        else:
            progress.skipped += 1
            progress.in_a_row += 1
            progress.spikes += result.spike
        if self.watch.is_damaged():
            self._go_back()
        facts = self._facts(result, lr, sizes, seconds)
        for observer in self.observers:
            observer(facts)
        if progress.in_a_row >= config.max_skipped:
            good = f"the last good checkpoint is {self.last_saved}" if self.last_saved else "there is no checkpoint"
            raise DivergedError(
                f"{progress.in_a_row} steps in a row had a loss or gradient that is not finite; {good}. "
                "Lower schedule.peak or look at the data"
            )
        if why := self.watch.verdict():
            good = f"the last checkpoint is {self.last_saved}" if self.last_saved else "there is no checkpoint"
            raise DivergedError(
                f"diverged: {why}; stopped after step {progress.step}, {good}. Lower schedule.peak; "
                "or set spikes.diverged_above=0 if this is how your data are"
            )

    def _accepts(self, loss: float, norm: float) -> bool:
        accepted = self.watch.accepts(loss, norm)
        if not accepted:
            most_loss, most_norm = self.watch.limits()
            log.warning(
                "draw %d of data is left out: loss %.4g (spike from %.4g), gradient norm %.4g (spike from %.4g)",
                *(self.progress.draws, loss, most_loss, norm, most_norm),
            )
        return accepted

    def _keep_good_state(self) -> None:
        """Copy what to go back to, when it is due and nothing is wrong."""
        guard, step = self.config.spikes, self.progress.step
        old = self.snapshot
        is_due = step % guard.snapshot_every == 0 and not self.watch.streak
        if guard.action == "rollback" and (old is None or (is_due and old.progress.step != step)):
            self.progress.watch = self.watch.state()
            self.snapshot = Snapshot.take(self.model, self.optimizers, self.progress)

    def _go_back(self) -> None:
        """To the last good state, on with other data."""
        snapshot, came_from = self.snapshot, self.progress.step
        assert snapshot is not None
        if snapshot.tries >= TRIES and snapshot.progress.step == came_from:
            log.warning("going back does not help: the data have changed at draw %d", self.progress.draws)
            self.watch.begin_anew()
            return
        if snapshot.tries >= TRIES:
            raise DivergedError(
                f"diverged: went back {TRIES} times to step {snapshot.progress.step}, and spikes came again by step "
                f"{came_from}. Lower schedule.peak or look at the data"
            )
        snapshot.restore(self.model, self.optimizers, self.progress)
        self.watch = Watch(self.config.spikes, snapshot.progress.watch)
        log.warning(
            "%d spikes in a row: back from step %d to %d", self.config.spikes.patience, came_from, self.progress.step
        )
        if self.checkpoints is not None:
            self.save()
            self.checkpoints.forget(after=self.progress.step)

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
            spikes=progress.spikes,
            rollbacks=progress.rollbacks,
            applied=result.applied,
            validation_loss=validation,
            metrics=result.metrics,
        )

    def _validate(self) -> float | None:
        if not self.validation:
            return None
        # weights that are not wholly rounded yet are no part of what is saved
        self.model.moment.share = 1.0
        return mean_loss(self.model, self.objective, self.validation)

    def is_save_due(self) -> bool:
        """Whether the settings ask for a checkpoint after this step."""
        step, config = self.progress.step, self.config
        if step == config.steps or (config.save_every and step % config.save_every == 0 and not self.progress.in_a_row):
            return True
        return bool(config.save_minutes) and time.monotonic() - self.saved_at >= 60 * config.save_minutes

    def save(self) -> None:
        """Write a checkpoint, where there is a folder."""
        if self.checkpoints is not None:
            progress, snapshot = self.progress, self.snapshot
            progress.watch = self.watch.state()
            progress.snapshot = {} if snapshot is None else snapshot.facts()
            more = {} if snapshot is None else {"snapshot": snapshot.tensors()}
            extra = self.objective.state()
            self.last_saved = self.checkpoints.save(self.model, self.optimizers, progress, self.identity, extra, more)
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
            spikes=progress.spikes,
            rollbacks=progress.rollbacks,
        )
