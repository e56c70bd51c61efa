"""How large the learning rate and the weight decay are at each step: pure functions of the step.

    warm-up   lr(s) = peak (s + 1) / W                                  s < W
    stable    lr(s) = peak                                              wsd, until the last R steps
    decay     lr(s) = low + (peak - low) f(t),  t = (s + 1 - (S - R)) / R  in (0, 1]
              f = 1 - t (linear),  (1 + cos pi t) / 2 (cosine),  1 - sqrt t (1-sqrt)

s counts updates made before this one, S is their number, W and R the lengths of warm-up and decay, low = peak times
`final_ratio`, reached at the last step. The "cosine" schedule is a cosine decay over everything after the warm-up.

"two-stage" is BitNet's: two cosine decays with an abrupt drop between them, at step H = `turn` S, and a weight decay d
that rises in the first stage and is off in the second:

    W <= s < H    lr from peak to peak before_turn,             d(s) = (1 - cos(pi (s + 1) / H)) / 2
    H <= s        lr from peak after_turn to low,               d(s) = 0

d multiplies the optimiser's weight_decay; it is 1 in all other schedules. The report gives neither the rates nor which
way the cosine of the weight decay goes, but that it "reaches" its peak; the ratios are those of public reproductions.

Source   Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay); Haegele et al. 2024, arXiv:2405.18392 (1-sqrt);
         Ma et al. 2025, arXiv:2504.12285 section 3.1 (two stages).
"""

import math
from dataclasses import dataclass
from typing import Literal

# of "two-stage": the share of the run before the drop, and the rates before and after it over the peak
TURN, BEFORE, AFTER = 0.5, 8 / 15, 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Settings of the learning rate, and of what becomes of the weight decay.

    peak: the largest rate. kind: "wsd" stays at the peak until the decay, "cosine" decays right after the warm-up,
    "two-stage" decays, drops and decays.
    warmup_steps: updates until the peak; None is 1 % of the run. decay_steps: updates of the decay of "wsd"; None is
    15 % of the run. decay: its shape; None is 1-sqrt. final_ratio: the last rate over the peak. turn, before_turn,
    after_turn: of "two-stage", None is 0.5, 8/15 and 1/3.
    """

    peak: float = 1e-3
    kind: Literal["wsd", "cosine", "two-stage"] = "wsd"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    decay: Literal["linear", "cosine", "1-sqrt"] | None = None
    final_ratio: float = 0.01
    turn: float | None = None
    before_turn: float | None = None
    after_turn: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ValueError(f"peak={self.peak}: the learning rate must be above 0, for example 1e-3")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio}: the last rate over the peak lies between 0 and 1")
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: a number of steps cannot be negative; use 0 for none")
        if self.kind != "wsd" and (self.decay_steps is not None or self.decay is not None):
            raise ValueError(f"decay_steps and decay describe kind='wsd'; leave them out with kind={self.kind!r}")
        stages = {"turn": self.turn, "before_turn": self.before_turn, "after_turn": self.after_turn}
        given = {name: value for name, value in stages.items() if value is not None}
        if given and self.kind != "two-stage":
            raise ValueError(f"{', '.join(given)}: of kind='two-stage'; leave them out with kind={self.kind!r}")
        for name, value in given.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must lie between 0 and 1: a share of the run, or of the peak")

    def lengths(self, steps: int) -> tuple[int, int]:
        """Updates of the warm-up and of the decay, in a run of `steps` updates.

        Raises: ValueError if both together are longer than the run.
        """
        warmup = round(0.01 * steps) if self.warmup_steps is None else self.warmup_steps
        if self.kind == "two-stage":
            # the second stage is a decay of its own; the warm-up must end before it
            decay = steps - self._turn(steps)
        elif self.kind == "cosine":
            decay = max(steps - warmup, 0)
        else:
            decay = round(0.15 * steps) if self.decay_steps is None else self.decay_steps
        if warmup + decay > steps and self.kind == "two-stage":
            raise ValueError(
                f"warmup_steps={warmup} goes beyond the drop after {steps - decay} of {steps} steps; "
                "shorten it, or move turn"
            )
        if warmup + decay > steps:
            raise ValueError(
                f"warmup_steps={warmup} and decay_steps={decay} are longer than the run of {steps} steps together; "
                "shorten one of them or train longer"
            )
        return warmup, decay

    def lr(self, step: int, steps: int) -> float:
        """The rate of one update.

        Args:
            step: updates made before, 0 .. steps - 1; beyond the end the last rate stays.
            steps: updates of the whole run.
        """
        warmup, decay = self.lengths(steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        begin = steps - decay
        low = self.peak * self.final_ratio
        if self.kind == "two-stage":
            if step < begin:
                end = self.peak * (BEFORE if self.before_turn is None else self.before_turn)
                return _cosine(self.peak, end, (step + 1 - warmup) / (begin - warmup))
            peak = self.peak * (AFTER if self.after_turn is None else self.after_turn)
            return _cosine(peak, low, min((step + 1 - begin) / decay, 1.0)) if decay else low
        if step < begin or not decay:
            return self.peak
        t = min((step + 1 - begin) / decay, 1.0)
        shape = "cosine" if self.kind == "cosine" else self.decay or "1-sqrt"
        left = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "1-sqrt": 1 - math.sqrt(t)}[shape]
        return low + (self.peak - low) * left

    def weight_decay(self, step: int, steps: int) -> float:
        """What the optimiser's weight decay is multiplied by in this update; arguments are those of `lr`."""
        if self.kind != "two-stage":
            return 1.0
        turn = self._turn(steps)
        return (1 - math.cos(math.pi * (step + 1) / turn)) / 2 if step < turn else 0.0

    def _turn(self, steps: int) -> int:
        """Updates of the first stage."""
        return round((TURN if self.turn is None else self.turn) * steps)


def _cosine(first: float, last: float, t: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * t)) / 2
