"""Decode steps without the host: a whole step, sampling included, is captured once as a CUDA graph and replayed.

    ids -> model -> logits -> sample -> ids        all on tensors that stay where they are

The host only reads the chosen ids after each step. Batches come in a few sizes ("buckets"), each with its own graph
over the first rows of one static cache; a batch that has shrunk moves to a smaller bucket. Without CUDA the same step
runs directly, for tests; where a step cannot be captured, the runner's own decode serves.
"""

import functools
import logging
from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.engine import runner
from plait.engine.runner import Row
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid
from plait.model.plan import needs
from plait.model.static import StaticCache
from plait.ops.sample import sample_ids, uniform_numbers

log = logging.getLogger(__name__)

# most that rows and room nobody uses may take of a cache
SPARE_BYTES = 1 << 31


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of each GPU to capture on, so that graphs share memory: PyTorch's own stays on the first GPU."""
    return torch.cuda.Stream(device)


def bucket(n: int) -> int:
    """The smallest batch that is captured and holds n sequences: powers of two to 32, then multiples of 32."""
    return 1 << (n - 1).bit_length() if n <= 32 else -(-n // 32) * 32


def captured(run: Callable[[], None], device: torch.device, pool: object) -> torch.cuda.CUDAGraph:
    """Record what `run` does on a GPU.

    Args:
        run: works on tensors that stay where they are.
        device: the GPU.
        pool: memory to share with other graphs that never run at the same time, or None.

    Raises: RuntimeError if something in it cannot be captured.
    """
    # streams and graphs belong to the current GPU, which need not be the model's
    with torch.cuda.device(device):
        aside = capture_stream(device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # compilers and libraries set themselves up on the first runs, which must not be recorded
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside):  # type: ignore[arg-type]
            run()
    return graph


class Step:
    """One token for every sequence of a static cache: its tensors, and the graph of it once it is captured."""

    def __init__(self, model: Hybrid, cache: StaticCache) -> None:
        """
        Args:
            model: any.
            cache: of B sequences; each run adds a token to all of them.
        """
        batch, device = cache.batch, model.device
        self.model, self.cache = model, cache
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.settings = {
            "temperature": torch.zeros(batch, device=device),
            "top_k": torch.zeros(batch, dtype=torch.int32, device=device),
            "top_p": torch.ones(batch, device=device),
            "min_p": torch.zeros(batch, device=device),
        }
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, rows: Sequence[Row], slots: Sequence[int]) -> None:
        """Take the settings of some sequences, which are at these places of the cache."""
        draws, at = [row.draw for row in rows], torch.tensor(slots, device=self.ids.device)
        for name, of in (
            ("temperature", lambda s: float(s.temperature)),
            ("top_k", lambda s: min(s.top_k or 0, 1 << 30)),
            ("top_p", lambda s: 1.0 if s.top_p is None else s.top_p),
            ("min_p", lambda s: s.min_p or 0.0),
        ):
            mine = self.settings[name]
            mine[at] = torch.tensor([of(draw.sampling) for draw in draws], dtype=mine.dtype).to(mine.device)
        seeds = [draw.seed & ((1 << 64) - 1) for draw in draws]
        signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
        self.seeds[at] = torch.tensor(signed).to(self.seeds.device)

    def draw(self, logits: Tensor) -> None:
        """Choose the next tokens of the first n sequences from (n, V) logits; -1 in `ids` where they are no numbers."""
        n = logits.shape[0]
        u = uniform_numbers(self.seeds[:n], self.cache.lengths[:n])
        self.ids[:n] = sample_ids(logits, u, **{name: t[:n] for name, t in self.settings.items()})

    def run(self) -> None:
        """Feed `ids`, then draw the next ones."""
        if self.graph is None:
            self._step()
        else:
            with torch.cuda.device(self.model.device):
                self.graph.replay()

    def capture(self, pool: object = None) -> None:
        """Record the step; what the cache holds is spoiled.

        Args:
            pool: memory to share with the other graphs, whose steps never run at the same time.

        Raises: RuntimeError if something in the step cannot be captured.
        """
        self.cache.lengths.zero_()
        self.graph = captured(self._step, self.model.device, pool)

    def _step(self) -> None:
        # a sequence that is broken is told to the host by its -1, and must not stop the others
        fed = self.ids.clamp(min=0)[:, None]
        x, _ = self.model.hidden(fed, cache=self.cache)
        x, head = x[:, -1], self.model.head
        self.draw(F.linear(x, self.model.embed.weight.to(x.dtype)) if head is None else head(x))


class Steps:
    """The steps of one model over one static cache, one per bucket; made again when a larger cache is needed."""

    def __init__(self, model: Hybrid) -> None:
        self.model = model
        self.cache: StaticCache | None = None
        self.steps: dict[int, Step] = {}
        # experts are given their tokens by the host, in the middle of a step
        self.captures = model.device.type == "cuda" and "E" not in model.config.pattern
        # whether the cache holds sequences that are not finished
        self.busy = False
        self._weights: list[int] = []

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether these sequences can be decoded here: on a GPU, and nothing about them is computed on the host."""
        return self.captures and all(row.draw.is_plain for row in rows)

    def ready(self, batch: int, capacity: int) -> list[Step]:
        """The steps for so many sequences with so much room, smallest bucket first; what the cache held is lost.

        Returns: none while others' sequences in the cache are not finished: two answers of an engine, read in turns.
        Raises: RuntimeError if one cannot be captured, or there is no memory for the cache.
        """
        if self.busy:
            log.warning("decoding without CUDA graphs: another answer of this engine is not finished")
            return []
        # a graph reads the weights where they were when it was captured
        weights = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        if weights != self._weights:
            self.steps, self._weights = {}, weights
        if self.cache is None or self.cache.batch < batch or self.cache.capacity < capacity:
            size = self._size(batch, capacity)
            self.steps, self.cache = {}, None
            config, compute = self.model.config, self.model.recipe.compute
            self.cache = StaticCache(config, *size, device=self.model.device, dtype=compute)
        sizes = [min(bucket(batch), self.cache.batch)]
        while sizes[0] > 1:
            # a graph for every halving would take longer to capture than it saves
            sizes.insert(0, bucket(-(-sizes[0] // 4)))
        pool = next((step.graph.pool() for step in self.steps.values() if step.graph is not None), None)
        for size in sizes:
            if size not in self.steps:
                step = Step(self.model, self.cache.first(size))
                if self.captures:
                    step.capture(pool)
                    assert step.graph is not None
                    pool = step.graph.pool()
                self.steps[size] = step
        return [self.steps[size] for size in sizes]

    def _size(self, batch: int, capacity: int) -> tuple[int, int]:
        """Rows and room of a new cache: what the next batches may need, and the last had, only if it costs little."""
        # room in steps of 1,024, so that the next prompt need not make it anew
        room, full = -(-capacity // 1024) * 1024, bucket(batch)
        held = (0, 0) if self.cache is None else (self.cache.batch, self.cache.capacity)
        least = self._bytes(batch, room)
        for size in ((max(full, held[0]), max(room, held[1])), (full, room)):
            if self._bytes(*size) - least <= SPARE_BYTES:
                return size
        return batch, room

    def _bytes(self, rows: int, room: int) -> int:
        n = needs(self.model.config, batch=1, context=room, width=self.model.recipe.compute.itemsize)
        return rows * (n.kv_per_token * room + n.ssm + n.conv)

    def give_up(self, error: RuntimeError) -> None:
        """Leave it for this time where memory is short; else never try again: the step cannot be captured here."""
        log.warning("decoding without CUDA graphs: %s", error)
        self.steps, self.cache = {}, None
        if not isinstance(error, torch.OutOfMemoryError):
            self.captures = False


def decode(
    model: Hybrid, rows: Sequence[Row], cache: Cache, logits: Tensor, steps: Steps
) -> Generator[list[int], None, None]:
    """Draw and feed tokens until every row is finished, as `runner.decode` does.

    Args:
        model: as for prefill.
        rows: B sequences without a repetition penalty; each `accept`s its tokens.
        cache: theirs; not touched until the end or the leaving, and then brought up to date if it holds one sequence.
        logits: (B, V) from prefill.
        steps: of this model.

    Yields: the ids drawn in this step, before they are fed.
    Raises: FloatingPointError if a row of logits holds no number.
    """
    try:
        ladder = steps.ready(len(rows), runner.room(rows, model.config.max_context))
    except RuntimeError as error:
        steps.give_up(error)
        ladder = []
    if not ladder:
        yield from runner.decode(model, rows, cache, logits)
        return
    ladder[-1].cache.clear()
    ladder[-1].cache.take(cache)
    yield from _decode(steps, rows, ladder, logits, cache)


def generate(model: Hybrid, rows: Sequence[Row], chunk: int, steps: Steps) -> Generator[list[int], None, None]:
    """Read the prompts of some sequences and write their answers, with one prompt cache of a few rows at a time.

    Beside the weights there are, at any time, the static cache of all sequences and a cache of the rows that are being
    read: as many as fit whole into a pass, so that no pass gives many rows a few tokens each; a longer one alone.

    Args:
        model: as for prefill.
        rows: sequences without a repetition penalty, longest prompts first; halved where memory is short.
        chunk: tokens of prompts per pass.
        steps: of this model.

    Yields: as `decode`.
    Raises: FloatingPointError if a row of logits holds no number.
    """
    prompts, room = [row.prompt for row in rows], runner.room(rows, model.config.max_context)
    ladder: list[Step] = []
    short = False
    try:
        ladder = steps.ready(len(rows), room)
    except RuntimeError as error:
        steps.give_up(error)
        short = isinstance(error, torch.OutOfMemoryError)
    # outside of the handler: the error's frames hold what was allocated before it
    if ladder:
        cache = ladder[-1].cache
        cache.clear()
        reads = parts([len(prompt) for prompt in prompts], chunk)
        logits = torch.cat([_read(model, prompts[part], chunk, cache, part.start) for part in reads])
        yield from _decode(steps, rows, ladder, logits, None)
    elif short and len(rows) > 1:
        half = len(rows) // 2
        for some in (rows[:half], rows[half:]):
            yield from generate(model, some, chunk, steps)
    else:
        ordinary = model.cache(len(rows), capacity=room)
        yield from runner.decode(model, rows, ordinary, runner.prefill(model, prompts, ordinary, chunk))


def parts(lengths: Sequence[int], chunk: int) -> list[slice]:
    """Which prompts are read together: neighbours that fit whole, with their padding, into a pass of `chunk` tokens."""
    result, first = [], 0
    while first < len(lengths):
        last, longest = first + 1, lengths[first]
        while last < len(lengths) and max(longest, lengths[last]) * (last + 1 - first) <= chunk:
            longest = max(longest, lengths[last])
            last += 1
        result.append(slice(first, last))
        first = last
    return result


def _read(model: Hybrid, prompts: Sequence[Sequence[int]], chunk: int, into: StaticCache, first: int) -> Tensor:
    """Logits after some prompts, whose states go to the places from `first` on; their own cache is freed on return."""
    cache = model.cache(len(prompts), capacity=max(map(len, prompts)))
    logits = runner.prefill(model, prompts, cache, chunk)
    into.take(cache, first)
    return logits


def _decode(
    steps: Steps, rows: Sequence[Row], ladder: list[Step], logits: Tensor, cache: Cache | None
) -> Generator[list[int], None, None]:
    """Decode what the last step's cache holds; `cache` as for `decode`, or None if nobody wants it."""
    model, steps.busy = steps.model, True
    rows, lengths = list(rows), [len(row.prompt) for row in rows]
    step = ladder.pop()
    slots, alone = list(range(len(rows))), cache is not None and len(rows) == 1
    try:
        step.load(rows, slots)
        step.draw(logits)
        while True:
            drawn = step.ids.tolist()
            ids = [drawn[slot] for slot in slots]
            if min(ids) < 0:
                raise FloatingPointError("the model's logits are not numbers; its weights or its precision are broken")
            for row, token_id in zip(rows, ids, strict=True):
                row.accept(token_id)
            yield ids
            going = [i for i, row in enumerate(rows) if row.reason is None]
            if len(going) < len(rows):
                cache_bytes = step.cache.used_bytes(lengths) // len(rows)
                for row in rows:
                    row.cache_bytes = cache_bytes
                if not going:
                    break
                for i in set(range(len(rows))) - {*going}:
                    step.cache.lengths[slots[i]] = 0  # nothing of it is read any more
                rows, slots = [rows[i] for i in going], [slots[i] for i in going]
                ids, lengths = [ids[i] for i in going], [lengths[i] for i in going]
                while ladder and ladder[-1].cache.batch >= len(rows):
                    slots = _shrunk(step, ladder[-1], rows, slots)
                    step = ladder.pop()
            if max(lengths) == step.cache.capacity:
                cache = model.cache(len(rows)) if cache is None else cache
                step.cache.give(cache, slots, lengths)
                alone = False
                fed = torch.tensor(ids, device=model.device)[:, None]
                yield from runner.decode(model, rows, cache, model(fed, cache=cache, n_logits=1).logits[:, 0])
                return
            step.run()
            lengths = [n + 1 for n in lengths]
    except GeneratorExit:
        if alone:
            assert cache is not None
            step.cache.give(cache, slots, lengths)
        raise
    finally:
        steps.busy = False
    if alone:
        assert cache is not None
        step.cache.give(cache, slots, lengths)


def _shrunk(step: Step, smaller: Step, rows: Sequence[Row], slots: Sequence[int]) -> list[int]:
    """Move sequences to the places that a smaller step serves; returns where they are now."""
    size = smaller.cache.batch
    free = iter(sorted(set(range(size)) - {*slots}))
    places = [slot if slot < size else next(free) for slot in slots]
    moves = [(old, new) for old, new in zip(slots, places, strict=True) if old != new]
    step.cache.move(moves)
    ids = step.ids.clone()
    smaller.ids.copy_(ids[:size])
    for old, new in moves:
        smaller.ids[new] = ids[old]
    smaller.load(rows, places)
    return places
