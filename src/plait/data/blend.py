"""Mix sources by weight, in phases, by arithmetic: which source the i-th sample of a run takes, and which one of it.

A run is a sequence of samples 0, 1, 2, ...; each phase divides it into blocks of 16384. In every block a source gets
the same number of places, its weight times the block, spread evenly with a little hashed jitter, so that also a short
run holds the weights. How many samples a source has given before sample i is then a product and a look into one
block: nothing is replayed to resume, and no sample of a source is skipped or given twice.

Source  phases of Nemotron-H, arXiv:2504.03624: the blend changes at 60 % and 80 % of training, the best text last.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from plait.data.shuffle import key_of, uniform

_BLOCK = 1 << 14


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training with fixed weights."""

    until: float
    """Where it ends: up to 1 a share of training, beyond 1 a number of tokens. The last phase has no end."""
    weights: dict[str, float]
    """Source -> weight; weights need not sum to 1."""

    def __post_init__(self) -> None:
        if not self.until > 0 or not math.isfinite(self.until):
            raise ValueError(f"until = {self.until} ends no phase; give a share (0.6) or a number of tokens (2000000)")
        for name, weight in self.weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"weight of {name} = {weight}; weights are numbers from 0")
        if not sum(self.weights.values()) > 0:
            raise ValueError(f"weights {self.weights} name no source; give at least one a weight above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """What a run reads: phases, and how often a source may be repeated.

    `max_epochs` maps a source, or "*" for all others, to the number of times that a run may go through it. A run that
    would go further is refused before it starts, with the numbers: spreading the rest over other sources in silence
    would be another blend than the one asked for.
    """

    phases: tuple[Phase, ...]
    max_epochs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases is empty; give at least one phase")
        for name, cap in self.max_epochs.items():
            if not cap > 0:
                raise ValueError(f"max_epochs of {name} = {cap}; give a number above 0")

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Blend":
        """One phase with these weights."""
        return cls(phases=(Phase(1.0, dict(weights)),))


class Plan:
    """A blend applied to a run: sample numbers in, (source, sample of it) out."""

    def __init__(
        self, blend: Blend, sizes: Mapping[str, int], *, seq_len: int, seed: int, n_samples: int | None = None
    ) -> None:
        """
        Args:
            blend: phases and caps.
            sizes: source -> samples in one epoch of it.
            seq_len: tokens in a sample, to place phases that end after a number of tokens.
            seed: changes the order within blocks.
            n_samples: length of the run; needed by phases that end after a share, and by caps.

        Raises: ValueError naming the phase or source that does not fit.
        """
        self._names = sorted({name for phase in blend.phases for name, weight in phase.weights.items() if weight > 0})
        for name in (*(name for phase in blend.phases for name in phase.weights), *blend.max_epochs):
            if name not in sizes and name != "*":
                raise ValueError(f"the blend names source {name!r}, which is not there; sources are {', '.join(sizes)}")
        self._places = [_places([phase.weights.get(name, 0.0) for name in self._names]) for phase in blend.phases]
        self._seed = seed
        self._order = lru_cache(maxsize=8)(self._sorted_block)
        self._begins = [0, *(_end(phase, seq_len, n_samples) for phase in blend.phases[:-1])]
        if any(a >= b for a, b in zip(self._begins, self._begins[1:], strict=False)):
            ends = ", ".join(str(phase.until) for phase in blend.phases)
            raise ValueError(f"phases end at {ends}: each must end at least one sample after the one before it")
        self._given = [np.zeros(len(self._names), np.int64)]
        for phase, (begin, end) in enumerate(zip(self._begins, self._begins[1:], strict=False)):
            self._given.append(self._given[-1] + self._count(phase, end - begin))
        self._check_caps(blend, sizes, n_samples)

    def locate(self, sample: int) -> tuple[str, int]:
        """The source that sample number `sample` of the run takes, and the number of the sample within that source."""
        phase = bisect_right(self._begins, sample) - 1
        block, place = divmod(sample - self._begins[phase], _BLOCK)
        source, rank = (int(column[place]) for column in self._order(phase, block))
        before = self._given[phase][source] + block * self._places[phase][source]
        return self._names[source], int(before) + rank

    def counts(self, sample: int) -> dict[str, int]:
        """How many samples each source has given before sample number `sample`."""
        phase = bisect_right(self._begins, sample) - 1
        given = self._given[phase] + self._count(phase, sample - self._begins[phase])
        return dict(zip(self._names, given.tolist(), strict=True))

    def _count(self, phase: int, length: int) -> np.ndarray:
        blocks, rest = divmod(length, _BLOCK)
        part = np.bincount(self._order(phase, blocks)[0][:rest], minlength=len(self._names))
        return blocks * self._places[phase] + part

    def _sorted_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        places = self._places[phase]
        source = np.repeat(np.arange(len(places)), places)
        rank = np.concatenate([np.arange(count) for count in places])
        # the j-th of n places of a source lies somewhere in [j / n, (j + 1) / n) of the block
        when = (rank + uniform(_BLOCK, key_of("blend", self._seed, phase, block))) / places[source]
        order = np.argsort(when, kind="stable")
        return source[order], rank[order]

    def _check_caps(self, blend: Blend, sizes: Mapping[str, int], n_samples: int | None) -> None:
        if not blend.max_epochs:
            return
        if n_samples is None:
            raise ValueError("max_epochs needs the length of the run; give the number of steps")
        for name, count in self.counts(n_samples).items():
            cap, epochs = blend.max_epochs.get(name, blend.max_epochs.get("*", math.inf)), count / sizes[name]
            if epochs > cap:
                raise ValueError(
                    f"source {name} would be read {epochs:.2f} times, max_epochs allows {cap:g}; lower its weight, "
                    "shorten the run, add text, or raise max_epochs"
                )


def _end(phase: Phase, seq_len: int, n_samples: int | None) -> int:
    if phase.until > 1:
        return math.ceil(phase.until / seq_len)
    if n_samples is None:
        raise ValueError(f"a phase ends at {phase.until:g} of the run, whose length is open; give the number of steps")
    return round(phase.until * n_samples)


def _places(weights: Sequence[float]) -> np.ndarray:
    """Divide a block by weight, whole numbers by largest remainder; any weight above 0 gets at least one place."""
    share = np.array(weights, dtype=np.float64) / sum(weights) * _BLOCK
    places = np.where(share > 0, np.maximum(np.floor(share), 1), 0).astype(np.int64)
    rest = _BLOCK - int(places.sum())
    if rest >= 0:
        places[np.argsort(places - share, kind="stable")[:rest]] += 1
    else:
        # many tiny weights were rounded up to one place: the largest pays
        places[np.argmax(places)] += rest
    return places
