"""Decoding at growing contexts: the 290 M hybrid against a Llama of its size, by the same engine, in turns.

What is measured and how a cache comes to its depth: see decode.py. The chart shows both figures over the context.
"""

from pathlib import Path

import torch

from plait.cli.bench import Inputs
from plait.cli.benches import frozen, limits, shapes
from plait.cli.benches.decode import READ, steps
from plait.cli.benches.picture import picture
from plait.cli.benches.sides import OURS, Side, add_median, add_ratio, add_share, alternate
from plait.cli.page.chart import Axis, Series, line_chart
from plait.compress.stopwatch import filled
from plait.report import Report, provenance
from plait.train.metrics import write_whole

DEPTHS = (0, 2048, 4096, 8192, 16384, 24576, 32768)
NAMES = {"hybrid": "290m", "Llama": "twin"}
# a name per side that `alternate` takes for one of ours
SIDES = {name: f"{OURS} {name}" for name in NAMES}


def measure(inputs: Inputs) -> Report:
    """Measure both at every depth."""
    recipe = (inputs.recipe or ("bf16",))[0]
    report = Report(f"decode, hybrid and Llama of its size, {recipe}, batch {inputs.batch}", provenance=provenance(0))
    report.add("threads", torch.get_num_threads())
    models = {}
    for name, known in NAMES.items():
        with frozen.checkpoint_of(known) as folder:
            models[name] = frozen.loaded(folder, recipe)
        report.add(f"{name} parameters", models[name].config.cost().params)
        frozen.check_ours(report, models[name], recipe, None, what=f"{name} {recipe}")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    sizes: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for depth in inputs.depth or DEPTHS:
        sides: dict[str, Side] = {}
        for name, model in models.items():
            n_bytes = filled(model, depth, inputs.batch).n_bytes()
            report.add(f"depth {depth} {name} cache", n_bytes, "bytes")
            sizes[name].append((depth, n_bytes))
            sides[SIDES[name]] = steps(model, depth, inputs.batch, inputs.steps, inputs.rounds)
        found = alternate(sides | {READ: limits.read()}, inputs.rounds, label=f"depth {depth}")
        speeds = {name: [inputs.batch / s for s in found[SIDES[name]]] for name in models}
        for name, values in speeds.items():
            rates[name].append((depth, add_median(report, f"depth {depth} {name}", values, "tokens/s")))
            need = shapes.weight_bytes(models[name]) + shapes.cache_bytes(models[name].config, depth, inputs.batch)
            share = f"depth {depth} {name}, share of the bandwidth"
            add_share(report, share, values, need / inputs.batch, found[READ])
        add_ratio(report, f"depth {depth} hybrid / Llama", speeds["hybrid"], speeds["Llama"])
        small, large = (sizes[name][-1][1] for name in NAMES)
        report.add(f"depth {depth} Llama's cache / the hybrid's", large / max(small, 1), "x")
    if inputs.chart:
        path = Path(inputs.chart)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, draw(rates, sizes))
    return report


def draw(rates: dict[str, list[tuple[float, float]]], sizes: dict[str, list[tuple[float, float]]]) -> str:
    """Both figures as one SVG: tokens/s and MB of cache over tokens of context."""
    x = Axis(label="tokens of context", show=lambda n: f"{n / 1024:g}k" if n else "0", ticks=_ticks(rates))
    in_mb = {name: [(depth, n / 1e6) for depth, n in points] for name, points in sizes.items()}
    speed = line_chart(_series(rates), x, Axis(label="tokens/s", from_zero=True), title="decode speed by context")
    cache = line_chart(_series(in_mb), x, Axis(label="cache, MB", from_zero=True), title="cache size by context")
    return picture([speed, cache])


def _series(curves: dict[str, list[tuple[float, float]]]) -> list[Series]:
    return [Series(name=name, index=i, points=points, dots=True) for i, (name, points) in enumerate(curves.items())]


def _ticks(rates: dict[str, list[tuple[float, float]]]) -> list[float]:
    deepest = max(depth for points in rates.values() for depth, _ in points)
    return [deepest * i / 4 for i in range(5)]
