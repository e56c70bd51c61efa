"""Third chapter: how fast both decode, and how large their caches are, as the context grows.

To measure at 32,768 tokens the cache is filled with random numbers of the right shapes instead of reading a text that
long: speed depends on how much there is to read, not on what it says.
"""

import statistics
import time

import torch

from plait.cli.benches.decode import filled
from plait.cli.chapters.story import HYBRID, TWIN, Story
from plait.cli.drawing import size
from plait.cli.page.blocks import Block, Chart, Prose, Section, Table
from plait.cli.page.chart import Axis, Series, line_chart
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid

ROUNDS = 5
# by model: (tokens, value)
Curves = dict[str, list[tuple[float, float]]]
# a model's name and a number of tokens
Case = tuple[str, int]


def tell(story: Story) -> Section:
    """Measure both models at every context of the scale."""
    story.say("decoding at growing contexts, both models in turns")
    rates: Curves = {HYBRID: [], TWIN: []}
    sizes: Curves = {HYBRID: [], TWIN: []}
    caches = {
        (name, context): filled(model, context, seed=story.seed)
        for context in story.scale.contexts
        for name, model in story.models.items()
    }
    for (name, context), cache in caches.items():
        sizes[name].append((context, cache.n_bytes()))
        story.report.add(f"{name} cache at {context} tokens", cache.n_bytes(), "bytes")
    story.threads.choose()
    for (name, context), seconds in step_seconds(story.models, caches, story.scale.decode_steps).items():
        each = [1 / s for s in seconds]
        rates[name].append((context, statistics.median(each)))
        what = f"{name} decode speed at {context} tokens"
        story.report.add(what, statistics.median(each), "tokens/s", len(each), statistics.pstdev(each))
    for context in story.scale.contexts:
        both = ", ".join(f"{name} {dict(found)[context]:,.0f} tokens/s" for name, found in rates.items())
        story.say(f"  {context:>6} tokens: {both}")
    for context in dict.fromkeys((story.scale.contexts[0], story.scale.contexts[-1])):
        at = {name: f"{dict(found)[context]:,.0f}" for name, found in rates.items()}
        story.compare(f"decode speed at {context:,} tokens", at, {}, "tokens/s")
    at = {name: size(found[-1][1]) for name, found in sizes.items()}
    story.compare(f"cache at {story.scale.contexts[-1]:,} tokens", at, {}, "")
    return Section(name="compare", title="The longer the context", blocks=_blocks(story, rates, sizes))


@torch.inference_mode()
def step_seconds(models: dict[str, Hybrid], caches: dict[Case, Cache], steps: int) -> dict[Case, list[float]]:
    """Seconds of single decoding steps, in ROUNDS turns over all models and contexts.

    A disturbance of the machine then falls on all of them alike. The first step of a turn is not counted.
    """
    seconds: dict[Case, list[float]] = {case: [] for case in caches}
    for _ in range(ROUNDS):
        for case, cache in caches.items():
            model = models[case[0]]
            ids = torch.ones(1, 1, dtype=torch.int64, device=model.device)
            for step in range(steps + 1):
                begin = time.perf_counter()
                # the next token has to be known before the next step
                ids = model(ids, cache=cache).logits.argmax(-1)
                int(ids)
                if step:
                    seconds[case].append(time.perf_counter() - begin)
    return seconds


def _blocks(story: Story, rates: Curves, sizes: Curves) -> tuple[Block, ...]:
    longest = story.scale.contexts[-1]
    attention = {name: model.config.pattern.count("*") for name, model in story.models.items()}
    words = (
        f"Attention reads the keys and values of all tokens so far for each new one; a Mamba-2 layer reads a state of "
        f"constant size. The hybrid has {attention[HYBRID]} attention layer{'s' * (attention[HYBRID] != 1)}, its twin "
        f"{attention[TWIN]}. The caches were filled with random numbers instead of reading {longest:,} tokens, which "
        "changes no time: it depends on how much there is, not on what it says."
    )
    samples = ROUNDS * story.scale.decode_steps
    note = f"one sequence, medians of {samples} steps in {ROUNDS} turns, random cache"
    x = Axis(label="tokens in the cache", show=_short, is_log=True, ticks=story.scale.contexts)
    speed = line_chart(
        _series(rates), x, Axis(label="tokens per second", show="{:,.0f}".format, from_zero=True), title="decode speed"
    )
    room = line_chart(
        _series(sizes), x, Axis(label="bytes, logarithmic", show=_bytes, is_log=True), title="cache size by context"
    )
    table = Table(
        caption="Decoding one token, and what has to be remembered for it.",
        head=(
            "tokens",
            f"{HYBRID}, tokens/s",
            f"{TWIN}, tokens/s",
            "ratio",
            f"{HYBRID}, cache",
            f"{TWIN}, cache",
            "ratio",
        ),
        rows=tuple(_row(i, context, rates, sizes) for i, context in enumerate(story.scale.contexts)),
        note=note,
    )
    return (
        Prose(text=words),
        Chart(title="Decoding speed", svg=speed, note=note),
        Chart(title="Cache of one sequence", svg=room, note="bytes of all layers' states, exact"),
        table,
    )


def _row(i: int, context: int, rates: Curves, sizes: Curves) -> tuple[str, ...]:
    (fast, slow), (small, large) = ([found[name][i][1] for name in (HYBRID, TWIN)] for found in (rates, sizes))
    first = (f"{context:,}", f"{fast:,.0f}", f"{slow:,.0f}", f"{fast / slow:.2f}")
    return (*first, size(small), size(large), f"{large / small:.2f}")


def _series(curves: Curves) -> list[Series]:
    return [Series(name=name, index=i, points=points, dots=True) for i, (name, points) in enumerate(curves.items())]


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def _bytes(n: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:g} {unit}"
    return f"{n:g}"
