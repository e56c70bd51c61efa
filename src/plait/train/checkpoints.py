"""The checkpoints of a run: one folder per saved step, the newest complete one resumes, the oldest go.

checkpoints/step-000100/   weights.safetensors  optimizer.safetensors  random.safetensors  state.json  complete.json
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from plait.dist import state
from plait.formats.checkpoint import Checkpoint, save
from plait.formats.folder import whole_folder
from plait.model.hybrid import Hybrid
from plait.train.optim import Optimizers
from plait.train.schedule import Schedule

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is.

    step: updates made. skipped: steps left out; step + skipped is how many draws of data were used. in_a_row: steps
    left out since the last update. tokens: read by all updates. loss, validation_loss: the latest. spikes: of the steps
    left out, those whose loss or gradient was finite and too large. rollbacks: times the run went back. watch: what
    the guard against spikes remembers; snapshot: of the state it would go back to.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    spikes: int = 0
    rollbacks: int = 0
    watch: dict[str, object] = field(default_factory=dict)
    snapshot: dict[str, object] = field(default_factory=dict)

    @property
    def draws(self) -> int:
        """Batches that the run has drawn from the data."""
        return self.step + self.skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What decides the numbers of a run: settings by dotted name, and the learning rates.

    Two runs with equal settings and equal rates up to a step are the same run up to there, so one may continue the
    other's checkpoint: this is how a run is made longer while its rate is still at the peak.
    """

    settings: dict[str, object]
    schedule: Schedule
    steps: int

    def differences(self, saved: dict[str, object], done: int) -> list[str]:
        """What a saved run of `done` updates did differently, in words.

        Args: saved: what `facts` gave there.
        """
        theirs = saved["settings"]
        assert isinstance(theirs, dict)
        found = [
            f"{name} was {theirs.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted({*theirs, *self.settings})
            if theirs.get(name) != self.settings.get(name)
        ]
        schedule, steps = saved["schedule"], saved["steps"]
        assert isinstance(schedule, dict) and isinstance(steps, int)
        before = Schedule(**schedule)
        if (before, steps) != (self.schedule, self.steps):
            for step in range(done):
                was, now = before.lr(step, steps), self.schedule.lr(step, self.steps)
                if was != now:
                    found.append(f"the learning rate of step {step + 1} was {was:.4g} and would be {now:.4g}")
                    break
                if before.weight_decay(step, steps) != self.schedule.weight_decay(step, self.steps):
                    found.append(f"the weight decay of step {step + 1} was another")
                    break
        return found

    def facts(self) -> dict[str, object]:
        """What to save, JSON-ready."""
        return {"settings": self.settings, "schedule": asdict(self.schedule), "steps": self.steps}


class Checkpoints:
    """The folder `checkpoints` of one run."""

    def __init__(self, folder: Path, keep: int, tokenizer: Path | None = None) -> None:
        """Args: folder: made at the first save. keep: how many to keep, at least 1. tokenizer: folder; goes along."""
        self.folder, self.keep, self.tokenizer = folder, keep, tokenizer

    def found(self) -> Iterator[tuple[Path, dict[str, object]]]:
        """Complete checkpoints with their facts, newest first."""
        if not self.folder.is_dir():
            return
        named = [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
        for path in sorted(named, key=lambda path: int(path.name[5:]), reverse=True):
            facts = state.facts(path)
            if facts is None:
                log.warning("%s is incomplete and is left alone", path)
            else:
                yield path, facts

    def latest(self) -> Path | None:
        """The newest complete one."""
        return next((path for path, _ in self.found()), None)

    def save(
        self,
        model: Hybrid,
        optimizers: Optimizers,
        progress: Progress,
        identity: Identity,
        extra: dict[str, object],
        more: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Path:
        """Write a checkpoint of this step, then delete the oldest others beyond `keep`.

        Args: more: further tensors by file and name, which `resume` gives back.
        Raises: OSError with the file's name; earlier checkpoints stay.
        """
        path = self.folder / f"step-{progress.step:06}"
        tensors = {"optimizer": optimizers.tensors(), "random": state.random_state(model.device), **(more or {})}
        held = [t for named in tensors.values() for t in named.values()]
        n_bytes = sum(t.nbytes for t in [*held, *model.state_dict().values()])
        facts = {"progress": asdict(progress), "objective": extra, **identity.facts()}
        with whole_folder(path, overwrite=True, replaces=lambda _: True, n_bytes=n_bytes) as aside:
            save(model, aside / "model", format="native", tokenizer=self.tokenizer)
            state.write(aside, tensors, facts)
        # a run that went back has later ones still, and must not lose this one to them
        for old, _ in [one for one in self.found() if one[0] != path][self.keep - 1 :]:
            _remove(old)
        return path

    def forget(self, after: int) -> None:
        """Delete the checkpoints of later steps, which a run that went back has left."""
        for path, _ in list(self.found()):
            if int(path.name[5:]) > after:
                _remove(path)

    def sweep(self) -> None:
        """Put right what killed processes left; only while no other process writes here."""
        sweep(self.folder, "step-*", state.is_whole)

    def resume(
        self, model: Hybrid, optimizers: Optimizers, identity: Identity
    ) -> tuple[Progress, dict[str, object], dict[str, dict[str, Tensor]]] | None:
        """Put the newest readable checkpoint into model and optimisers.

        Returns: the progress, what the objective saved, and all tensors by file; None if there is no checkpoint.
        Raises: ValueError if it was made by another run, naming what differs.
        """
        for path, facts in self.found():
            saved = facts["progress"]
            assert isinstance(saved, dict)
            differences = identity.differences(facts, saved["step"])
            if differences:
                raise ValueError(
                    f"{path} comes from another run: {'; '.join(differences)}. "
                    "Put the settings back, or choose another folder with --out"
                )
            try:
                tensors, facts = state.read(path)
            except ValueError as error:
                log.warning("%s; trying the one before", error)
                continue
            named = model.state_dict()
            for name, tensor in Checkpoint.open(path / "model").tensors.items():
                tensor.copy_to(named[name])
            optimizers.load(tensors["optimizer"])
            state.set_random_state(tensors["random"], model.device)
            log.info("resuming from %s", path)
            extra = facts["objective"]
            assert isinstance(extra, dict)
            return Progress(**saved), extra, tensors
        return None


def _remove(old: Path) -> None:
    # a kill in the middle leaves nothing that looks like a checkpoint
    doomed = old.with_name(f".{old.name}.{os.getpid()}.gone")
    os.rename(old, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path, name: str, is_whole: Callable[[Path], bool]) -> None:
    """Put right what killed processes left of the folders called `name` in another one.

    A whole folder that lacks only its name gets it, the replacement before the replaced; all others are deleted.

    Args: name: a pattern. is_whole: reads a folder and tells whether nothing is missing or damaged.
    """
    for end in ("new", "old", "gone"):
        for path in sorted(folder.glob(f".{name}.*.{end}")):
            target = folder / path.name[1:].partition(".")[0]
            if end != "gone" and not target.exists() and is_whole(path):
                os.rename(path, target)
                log.info("%s was left by a killed process and is put back", target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def flatten(data: object, where: str = "") -> dict[str, object]:
    """Nested tables as one, by dotted name."""
    if isinstance(data, dict):
        at = f"{where}." if where else ""
        return {key: value for name, item in data.items() for key, value in flatten(item, at + name).items()}
    return {where: list(data) if isinstance(data, tuple) else data}
