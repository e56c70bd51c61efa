"""Where in its training a model is: what random rounding draws from, and whether a late switch has come.

One of these is shared by all linear layers of a model. The training loop sets it before each update; as it follows
from the run's seed and the step alone, a resumed run and a recomputed layer round as before.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Moment:
    """seed: of the run. draw: steps tried so far, skipped ones included. part: which micro-batch of the step, counted
    over all processes: each has other tokens and draws other numbers for them; weights are rounded alike in all parts.

    is_late: whether the recipe's late switch is on. share: how far a gradual recipe rounds weights, 1 wholly.
    """

    seed: int = 0
    draw: int = 0
    part: int = 0
    is_late: bool = False
    share: float = 1.0
