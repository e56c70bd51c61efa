"""How well a library of measured blocks tells the time of models that were never run: random architectures, both ways.

    predicted = rest + sum of blocks (compress/library.py);  measured = the model itself, run as the engine runs it,
                in turns with those blocks
    error     = |predicted / measured - 1|;  rank correlation is Spearman's, equal values sharing their mean rank

Architectures differ in width, depth, order of layers and the size of every layer, as those of a search do. The first
length and the first recipe that are given count.
"""

import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from plait.cli.bench import Inputs
from plait.cli.benches.picture import picture
from plait.cli.benches.sides import add_median
from plait.cli.page.chart import Axis, Series, line_chart
from plait.compress.blocks import Times, read_bytes
from plait.compress.costs import Costs, Load
from plait.compress.library import BlockLibrary
from plait.compress.numbers import Numbers
from plait.compress.stopwatch import Run
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.report import Report, provenance
from plait.train.metrics import write_whole

TOKENS, VOCAB = 512, 8192
WIDTHS = (256, 384, 512)
WHAT = ("prefill", "decode")
# what the issue of compression asks for
MAX_ERROR, MIN_RANK = 0.10, 0.95

# predicted and measured seconds
Pairs = list[tuple[float, float]]


def measure(inputs: Inputs) -> Report:
    """Predict and measure every architecture."""
    load = Load(batch=inputs.batch, context=(inputs.tokens or (TOKENS,))[0])
    weights = (inputs.recipe or ("bf16",))[0]
    report = Report(
        f"latency of {inputs.count} random architectures, {weights}, batch {load.batch}, {load.context} tokens",
        provenance=provenance(seed=inputs.seed),
    )
    report.add("threads", torch.get_num_threads())
    rng = random.Random(inputs.seed)
    configs = [random_config(rng) for _ in range(inputs.count)]
    steps = [Run(config=config, weights=weights, load=load) for config in configs]
    reads = [replace(run, is_whole=True) for run in steps]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(inputs.library) if inputs.library else Path(folder) / "blocks.jsonl"
        library = BlockLibrary(path=path, rounds=inputs.rounds)
        costs, known = Costs(load=load, numbers=Numbers(weights=weights), clock=library), len(library.entries)

        def predict() -> list[Times]:
            totals = []
            for config in configs:
                library.footprint = read_bytes(config, load, weights)
                totals.append(costs.total(config))
            return [(total.prefill_s, total.decode_s) for total in totals]

        # models in turns with their parts, as the machine's speed drifts
        predicted, seconds = library.together(predict, beside=[*reads, *steps])
        report.add("blocks measured", len(library.entries) - known)
    pairs: dict[str, Pairs] = {what: [] for what in WHAT}
    for i, (told, read, step) in enumerate(zip(predicted, reads, steps, strict=True)):
        both = dict(zip(WHAT, zip(told, (seconds[read], seconds[step]), strict=True), strict=True))
        for what, pair in both.items():
            pairs[what].append(pair)
        words = ", ".join(f"{w} {p * 1e3:.2f} ms for {m * 1e3:.2f}" for w, (p, m) in both.items())
        report.add(f"{i + 1}: {step.config.pattern}", words)
    for what, found in pairs.items():
        judge(report, what, found)
    if inputs.chart:
        Path(inputs.chart).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(inputs.chart), draw(pairs))
    return report


def judge(report: Report, what: str, pairs: Pairs) -> None:
    """Add the errors of some predictions, their rank correlation, and whether both are good enough."""
    errors = [abs(p / m - 1) for p, m in pairs]
    median = add_median(report, f"{what}, error", errors, "")
    report.add(f"{what}, predicted / measured", statistics.median(p / m for p, m in pairs), "x", n=len(pairs))
    rank = rank_correlation([p for p, _ in pairs], [m for _, m in pairs])
    report.add(f"{what}, rank correlation", rank, "", n=len(pairs))
    verdict = "yes" if median <= MAX_ERROR and rank >= MIN_RANK else "no"
    report.add(f"{what}, error at most {MAX_ERROR:.0%} and correlation at least {MIN_RANK}", verdict)


def random_config(rng: random.Random) -> ModelConfig:
    """A hybrid of 8 to 16 layers, each of its own size out of a few."""
    d_model = rng.choice(WIDTHS)
    layers = [_layer(rng, d_model) for _ in range(rng.randint(8, 16))]
    return ModelConfig(vocab_size=VOCAB, d_model=d_model, layers=tuple(layers))


def _layer(rng: random.Random, d_model: int) -> LayerSpec:
    kind = rng.choices("M*-", weights=(4, 1, 4))[0]
    if kind == "M":
        return Mamba2(n_heads=rng.choice((4, 8, 12)), head_dim=64, d_state=rng.choice((32, 64)), n_groups=4)
    if kind == "*":
        return Attention(n_heads=8, n_kv_heads=rng.choice((1, 2, 8)), head_dim=64)
    return MLP(d_ff=rng.choice((1, 2, 4)) * d_model)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's coefficient, -1 to 1; nan where one side has no order."""
    ranks = [_ranks(a), _ranks(b)]
    if any(len(set(r)) < 2 for r in ranks):
        return float("nan")
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from 1, equal values sharing the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def draw(pairs: dict[str, Pairs]) -> str:
    """Measured over predicted, beside the line where both are equal, as one SVG."""
    charts = []
    for what, found in pairs.items():
        points = sorted((p * 1e3, m * 1e3) for p, m in found)
        ends = [min(p for p, _ in points), max(p for p, _ in points)]
        # points by themselves: nothing lies between two architectures
        dots = [Series(name="", index=0, points=[point], dots=True) for point in points[:-1]]
        last = Series(name="measured", index=0, points=points[-1:], dots=True)
        series = [Series(name="equal", index=1, points=[(x, x) for x in ends], faint=True), *dots, last]
        axes = Axis(label=f"predicted {what}, ms", from_zero=True), Axis(label="measured, ms", from_zero=True)
        charts.append(line_chart(series, *axes, title=f"{what}: predicted and measured"))
    return picture(charts)
