"""How large the learning rate is at each step: a pure function of the step.

    warm-up   lr(s) = peak (s + 1) / W                                  s < W
    stable    lr(s) = peak                                              wsd, until the last R steps
    decay     lr(s) = low + (peak - low) f(t),  t = (s + 1 - (S - R)) / R  in (0, 1]
              f = 1 - t (linear),  (1 + cos pi t) / 2 (cosine),  1 - sqrt t (1-sqrt)

s counts updates made before this one, S is their number, W and R the lengths of warm-up and decay, low = peak times
`final_ratio`, reached at the last step. The "cosine" schedule is a cosine decay over everything after the warm-up.

Source   Hu et al. 2024, arXiv:2404.06395 (warm-up, stable, decay); Haegele et al. 2024, arXiv:2405.18392 (1-sqrt).
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Settings of the learning rate.

    peak: the largest rate. kind: "wsd" stays at the peak until the decay, "cosine" decays right after the warm-up.
    warmup_steps: updates until the peak; None is 1 % of the run. decay_steps: updates of the decay of "wsd"; None is
    15 % of the run. decay: its shape; None is 1-sqrt. final_ratio: the last rate over the peak.
    """

    peak: float = 1e-3
    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    decay: Literal["linear", "cosine", "1-sqrt"] | None = None
    final_ratio: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ValueError(f"peak={self.peak}: the learning rate must be above 0, for example 1e-3")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio={self.final_ratio}: the last rate over the peak lies between 0 and 1")
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: a number of steps cannot be negative; use 0 for none")
        if self.kind == "cosine" and (self.decay_steps is not None or self.decay is not None):
            raise ValueError("decay_steps and decay describe kind='wsd'; leave them out with kind='cosine'")

    def lengths(self, steps: int) -> tuple[int, int]:
        """Updates of the warm-up and of the decay, in a run of `steps` updates.

        Raises: ValueError if both together are longer than the run.
        """
        warmup = round(0.01 * steps) if self.warmup_steps is None else self.warmup_steps
        if self.kind == "cosine":
            decay = max(steps - warmup, 0)
        else:
            decay = round(0.15 * steps) if self.decay_steps is None else self.decay_steps
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
        if step < begin or not decay:
            return self.peak
        t = min((step + 1 - begin) / decay, 1.0)
        shape = "cosine" if self.kind == "cosine" else self.decay or "1-sqrt"
        left = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "1-sqrt": 1 - math.sqrt(t)}[shape]
        low = self.peak * self.final_ratio
        return low + (self.peak - low) * left
