"""Loss spikes: a bad batch is told from a running band and left out; a run that diverges is stopped early.

    loss > median + width max(s, 2 % of |median|)            s of the last `window` losses, or
    log |g| > median + width max(s, 1/4)                     s of as many gradient norms
    s = max(1.4826 MAD, (p90 - median) / 1.2816)

MAD is the median of the distances from the median, p90 the value that a tenth exceeds; both factors give the standard
deviation of normal noise, and the larger result allows for texts of several kinds. Loss and norm are known before the
optimiser moves, so a batch that spikes leaves no trace. Several in a row are no bad batch: either the data have
changed, and the band begins anew ("skip"), or the weights are damaged, and the run goes back to the last good ones
("rollback"); if those can take none of the next batches either, three times, the data have changed after all. A run has
diverged when the median of its last 32 losses has long lain far above the best that it had, or above its first loss.

What is decided depends on the losses and norms of the steps before and on nothing else, and is saved with the run.

Source   Chowdhery et al. 2022, arXiv:2204.02311 section 5.1 (go back, leave out the batches); OLMo-core's SkipStep (a
         band of 6 standard deviations over 128 steps; medians here, which a spike that was let in does not widen).
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Literal

from torch import Tensor, nn

from plait.train.checkpoints import Progress
from plait.train.optim import Optimizers

# losses whose median tells where a run stands
LEVEL = 32
# times that a run may go back to the same state
TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Spikes:
    """Settings of the guard.

    action: "skip" leaves a batch out whose loss or gradient norm spikes; "rollback" also goes back when several spike
    in a row, at the price of a second copy of weights and moments; "off" takes every batch. window: steps of the band;
    nothing is judged before half of them. width: of the band, in standard deviations; real runs stay below half of the
    default. patience: spikes in a row that are left out. snapshot_every: steps between states to go back to.
    diverged_above: nats per token above the best loss that count as diverged; 0 never. diverged_for: for so many steps.
    """

    action: Literal["skip", "rollback", "off"] = "skip"
    window: int = 128
    width: float = 8.0
    patience: int = 4
    snapshot_every: int = 100
    diverged_above: float = 2.0
    diverged_for: int = 100

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("patience", 1), ("snapshot_every", 1), ("diverged_for", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.width > 0:
            raise ValueError(f"width={self.width}: must be more than 0; 8 lets every ordinary batch through")
        if not self.diverged_above >= 0:
            raise ValueError(f"diverged_above={self.diverged_above}: must be 0 or more; 0 never stops a run")


class Watch:
    """What the guard remembers of a run."""

    def __init__(self, settings: Spikes, state: Mapping[str, object] | None = None) -> None:
        """Args: settings: see there. state: what `state` gave, to continue from."""
        self.settings = settings
        old = dict(state or {})
        self.losses: deque[float] = deque(_numbers(old.get("losses")), settings.window)
        self.norms: deque[float] = deque(_numbers(old.get("norms")), settings.window)
        self.recent: deque[float] = deque(_numbers(old.get("recent")), LEVEL)
        best, above, streak = old.get("best"), old.get("above", 0), old.get("streak", 0)
        self.best = best if isinstance(best, float) else None
        self.above, self.streak = int(str(above)), int(str(streak))

    def state(self) -> dict[str, object]:
        """All of it, JSON-ready."""
        lists = {"losses": list(self.losses), "norms": list(self.norms), "recent": list(self.recent)}
        return {**lists, "best": self.best, "above": self.above, "streak": self.streak}

    def limits(self) -> tuple[float, float]:
        """The loss and the gradient norm from which on a step is a spike; infinite while too little is known."""
        if self.settings.action == "off" or len(self.losses) < self.settings.window // 2:
            return math.inf, math.inf
        width = self.settings.width
        return _top(self.losses, width, 0.02 * abs(median(self.losses))), math.exp(_top(self.norms, width, 0.25))

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether an update from this finite loss and gradient norm may be made; remembers what was decided."""
        most_loss, most_norm = self.limits()
        if loss > most_loss or norm > most_norm:
            self.streak += 1
            if self.settings.action == "rollback" or self.streak <= self.settings.patience:
                return False
            self.begin_anew()
        self.streak = 0
        self.losses.append(loss)
        self.norms.append(math.log(max(norm, 1e-30)))
        self.recent.append(loss)
        self._compare()
        return True

    def begin_anew(self) -> None:
        """Forget the band: the data are others now."""
        self.losses.clear()
        self.norms.clear()
        self.streak = 0

    def _compare(self) -> None:
        if self.best is None:
            self.best = self.recent[-1]
        if len(self.recent) < LEVEL:
            return
        level = median(self.recent)
        self.best = min(self.best, level)
        self.above = self.above + 1 if level > self.best + self.settings.diverged_above else 0

    def is_damaged(self) -> bool:
        """Whether so many steps in a row spiked that the run should go back."""
        return self.settings.action == "rollback" and self.streak >= self.settings.patience

    def verdict(self) -> str:
        """Why the run has diverged, in words; "" if it has not."""
        s = self.settings
        if not s.diverged_above or self.above < s.diverged_for or self.best is None:
            return ""
        return (
            f"the loss has been more than {s.diverged_above:g} above its best for {self.above} steps: "
            f"{median(self.recent):.3f} now, {self.best:.3f} at best (medians of {LEVEL} steps)"
        )


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """A state to go back to. tries: how often the run has been there again."""

    progress: Progress
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    tries: int = 0

    @classmethod
    def take(cls, model: nn.Module, optimizers: Optimizers, progress: Progress) -> "Snapshot":
        """Copy the state after an update."""
        return cls(
            progress=replace(progress, snapshot={}),
            weights={name: t.detach().clone() for name, t in model.state_dict().items()},
            moments={name: t.detach().clone() for name, t in optimizers.tensors().items()},
        )

    def restore(self, model: nn.Module, optimizers: Optimizers, progress: Progress) -> None:
        """Put it back; the draws of data that were used since count as skipped, so that new ones come."""
        named = model.state_dict()
        for name, t in self.weights.items():
            named[name].copy_(t)
        optimizers.load(self.moments)
        old, draws = self.progress, progress.step + progress.skipped
        for field in fields(old):
            if field.name not in ("spikes", "rollbacks"):
                setattr(progress, field.name, getattr(old, field.name))
        progress.skipped, progress.in_a_row = draws - old.step, 0
        progress.rollbacks += 1
        self.tries += 1

    def tensors(self) -> dict[str, Tensor]:
        """What to save of it, besides `facts`."""
        kinds = (("weights", self.weights), ("moments", self.moments))
        return {f"{kind}:{name}": t for kind, named in kinds for name, t in named.items()}

    def facts(self) -> dict[str, object]:
        """The rest, JSON-ready."""
        return {"progress": asdict(self.progress), "tries": self.tries}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object], like: Mapping[str, Tensor]) -> "Snapshot":
        """What `tensors` and `facts` were made of; `like` says on which devices the weights lie."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
        for key, t in tensors.items():
            kind, _, name = key.partition(":")
            at = like.get(name if kind == "weights" else name.rpartition("/")[0])
            parts[kind][name] = t if at is None else t.to(at.device)
        progress = facts["progress"]
        assert isinstance(progress, dict)
        return cls(progress=Progress(**progress), tries=int(str(facts["tries"])), **parts)


def _top(values: Iterable[float], width: float, least: float) -> float:
    ordered = sorted(values)
    middle, high = median(ordered), ordered[9 * len(ordered) // 10]
    return middle + width * max(
        1.4826 * median(abs(value - middle) for value in ordered), (high - middle) / 1.2816, least
    )


def _numbers(values: object) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []
