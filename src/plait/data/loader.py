"""Batches for training: batch number `step` is a pure function of (seed, step), whoever asks and how often.

Resuming is asking for the next number. The batch of a step is the same for any number of ranks (each takes its rows of
it) and of background threads.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.data.blend import Blend, Plan
from plait.data.packing import IGNORED, Packing
from plait.data.shards import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of packed documents (B rows, L tokens each)."""

    ids: Tensor
    """(B, L) int64: tokens."""
    targets: Tensor
    """(B, L) int64: the token that position t must predict (shifted already), -100 where there is none."""
    starts: Tensor
    """(B, L) bool: True at the first position of a row and at each document's first token; state starts anew there."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(ids=self.ids.to(device), targets=self.targets.to(device), starts=self.starts.to(device))

    def split(self, parts: int) -> list["Batch"]:
        """Cut the rows into equal parts, for gradient accumulation; raises ValueError if they do not divide."""
        rows = self.ids.shape[0]
        if parts < 1 or rows % parts:
            raise ValueError(f"{rows} rows do not divide into {parts} equal parts; choose a divisor of {rows}")
        pieces = (tensor.split(rows // parts) for tensor in (self.ids, self.targets, self.starts))
        return [Batch(ids=a, targets=b, starts=c) for a, b, c in zip(*pieces, strict=True)]


class Loader:
    """Makes batches from datasets and a blend."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        blend: Blend | None = None,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        steps: int | None = None,
        repeat: bool = True,
    ) -> None:
        """
        Args:
            datasets: source name, as in the blend -> dataset.
            blend: how sources are mixed; None takes each in proportion to its tokens.
            batch_size: rows of a step over all ranks.
            seq_len: tokens in a row.
            seed: gives the order of everything.
            rank, world: this process takes rows [rank, rank + 1) * batch_size / world of each batch.
            steps: length of the run, for phases given as shares and for epoch caps.
            repeat: False masks the targets of samples beyond the first epoch of their source: for validation, where
                n_steps_per_epoch() batches then count every token once.

        Raises: ValueError naming what does not fit; an empty dataset is named with its folder.
        """
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(f"batch_size = {batch_size} must be a multiple of the number of ranks, {world}")
        if not 0 <= rank < world:
            raise ValueError(f"rank = {rank} is not below the number of ranks, {world}")
        if not datasets:
            raise ValueError("there are no datasets; give at least one folder written by plait tokenize")
        self.batch_size, self.seq_len = batch_size, seq_len
        self._rows = batch_size // world
        self._first = rank * self._rows
        self._repeat = repeat
        self._packings = {name: Packing(dataset, seq_len, seed=seed, name=name) for name, dataset in datasets.items()}
        sizes = {name: packing.n_samples for name, packing in self._packings.items()}
        blend = blend or Blend.of(sizes)
        n_samples = None if steps is None else steps * batch_size
        self.plan = Plan(blend, sizes, seq_len=seq_len, seed=seed, n_samples=n_samples)
        """Which sample comes from where; `plan.counts(step * batch_size)` tells what each source has given."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all ranks."""
        return self.batch_size * self.seq_len

    def n_steps_per_epoch(self) -> int:
        """Steps after which as many samples have been given as all sources hold (the last step may go beyond)."""
        return -(-sum(packing.n_samples for packing in self._packings.values()) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The rows of this rank in the batch of step `step` (from 0)."""
        if step < 0:
            raise ValueError(f"step = {step}; steps count from 0")
        shape = (self._rows, self.seq_len)
        ids, targets, starts = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.bool_)
        for row in range(self._rows):
            name, sample = self.plan.locate(step * self.batch_size + self._first + row)
            packing = self._packings[name]
            packing.fill(sample, ids[row], targets[row], starts[row])
            if not self._repeat and sample >= packing.n_samples:
                targets[row] = IGNORED
        return Batch(ids=torch.from_numpy(ids), targets=torch.from_numpy(targets), starts=torch.from_numpy(starts))

    def iterate(self, start_step: int = 0, stop_step: int | None = None, *, workers: int = 1) -> Iterator[Batch]:
        """Yield batch(start_step), batch(start_step + 1), ... up to stop_step (for ever if None).

        Args:
            start_step, stop_step: which steps.
            workers: threads that prepare batches ahead; 0 makes each when it is asked for. The batches are the same.
        """
        step = start_step
        if workers < 1:
            while stop_step is None or step < stop_step:
                yield self.batch(step)
                step += 1
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="plait-loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            while ahead or stop_step is None or step < stop_step:
                while len(ahead) <= workers and (stop_step is None or step < stop_step):
                    ahead.append(pool.submit(self.batch, step))
                    step += 1
                yield ahead.popleft().result()
        finally:
            # also when the caller walks away in the middle
            pool.shutdown(wait=True, cancel_futures=True)
