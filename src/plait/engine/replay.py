"""Steps of the running batch without the host: each size of batch is captured once as a CUDA graph and replayed.

    ids, slots, tables, lengths -> model -> logits        all on tensors that stay where they are

Batches come in a few sizes (plait.engine.graph's buckets) and page tables in powers of two; rows that fill up a batch
are nobody's: slot 0, page 0. Tokens are drawn outside of it, so that constraints and penalties need nothing special.
Without CUDA the same step can be run directly, for tests; where it cannot be captured, the ordinary forward serves.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.engine.graph import bucket, captured
from plait.model.hybrid import Hybrid
from plait.model.layers.attention import Attention
from plait.model.paged import PagedCache, StaticRows

log = logging.getLogger(__name__)


class _Step:
    """One token of `batch` sequences with tables of `width` pages: its tensors, and the graph once it is captured."""

    def __init__(self, model: Hybrid, cache: PagedCache, batch: int, width: int) -> None:
        self.model, self.cache = model, cache
        self.ids, self.slots, self.lengths = (
            torch.zeros(batch, dtype=torch.int64, device=model.device) for _ in range(3)
        )
        self.tables = torch.zeros(batch, width, dtype=torch.int64, device=model.device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, ids: list[int], slots: list[int], lengths: list[int], tables: list[list[int]]) -> None:
        """Take some sequences, at most as many as there are rows."""
        batch, width = self.tables.shape
        none = batch - len(ids)
        for mine, values in ((self.ids, ids), (self.slots, slots), (self.lengths, lengths)):
            mine.copy_(torch.tensor(values + [0] * none))
        filled = [pages[:width] + [0] * (width - len(pages)) for pages in tables] + [[0] * width] * none
        self.tables.copy_(torch.tensor(filled))

    def run(self) -> Tensor:
        """Logits (batch, V), which the next run overwrites."""
        if self.graph is None:
            self._step()
        else:
            with torch.cuda.device(self.model.device):
                self.graph.replay()
        assert self.logits is not None
        return self.logits

    def capture(self, pool: object) -> None:
        """Record the step on rows that are nobody's.

        Raises: RuntimeError if something in it cannot be captured.
        """
        self.graph = captured(self._step, self.model.device, pool)

    def _step(self) -> None:
        rows = StaticRows(self.cache, self.slots, self.tables, self.lengths)
        x, _ = self.model.hidden(self.ids[:, None], cache=rows)
        rows.store()
        x, head = x[:, -1], self.model.head
        self.logits = F.linear(x, self.model.embed.weight.to(x.dtype)) if head is None else head(x)


class Replays:
    """The captured steps of one model over one paged cache."""

    def __init__(self, model: Hybrid, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        config, at_random = model.config, any(state.kept.is_random for state in cache.slot_states())
        soft = any(isinstance(spec, Attention) and spec.is_soft for spec in config.layers)
        same = all(state.k.dtype == model.recipe.compute for state in cache.kv_states())
        # experts are given their tokens by the host, in the middle of a step
        self.fits = "E" not in config.pattern and same and not at_random and not soft
        self.captures = self.fits and model.device.type == "cuda"
        self._steps: dict[tuple[int, int], _Step] = {}
        self._weights: list[int] = []

    def step(self, ids: list[int], slots: list[int], lengths: list[int], tables: list[list[int]]) -> Tensor | None:
        """Logits of one token of each sequence, its memory moved on.

        Args:
            ids, slots, tables: as for plait.model.step.step_rows.
            lengths: tokens before the new one.

        Returns: (B, V); None where it cannot be captured, and nothing has happened.
        """
        if not self.captures:
            return None
        try:
            step = self._ready(len(ids), max(1, max(map(len, tables))))
        except RuntimeError as error:
            log.warning("decoding without CUDA graphs: %s", error)
            self._steps = {}
            self.captures = isinstance(error, torch.OutOfMemoryError)
            return None
        step.load(ids, slots, lengths, tables)
        # sequences hold on to their rows of it until the next step
        return step.run()[: len(ids)].clone()

    def _ready(self, batch: int, width: int) -> _Step:
        # a graph reads the weights where they were when it was captured
        weights = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        if weights != self._weights:
            self._steps, self._weights = {}, weights
        key = bucket(batch), 1 << (width - 1).bit_length()
        if key not in self._steps:
            step = _Step(self.model, self.cache, *key)
            if self.model.device.type == "cuda":
                others = (each.graph for each in self._steps.values() if each.graph is not None)
                step.capture(next((graph.pool() for graph in others), None))
            self._steps[key] = step
        return self._steps[key]
