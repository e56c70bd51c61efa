"""The page of a run's telemetry: what grows in which layer, and what the gates and states of every head do.

RUN/telemetry.jsonl -> RUN/telemetry.html. Lines over the steps, one per layer; for Mamba-2 layers the distributions of
dt, of the decay exp(dt A), of state norms and of saturated gates over the heads, as of the last sample.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from plait.cli.page.blocks import Block, Chart, Prose, Section
from plait.cli.page.chart import Axis, Series, line_chart
from plait.cli.page.render import page, write_whole
from plait.report import Value
from plait.train.metrics import read_lines

Row = Mapping[str, Any]
Points = list[tuple[float, float]]

# figure -> what it is, in the order of the page
OVER_STEPS = {
    "qkv.l2": "Outputs of QKV",
    "proj.l2": "Outputs of Proj",
    "fc1.l2": "Outputs of FC1",
    "fc2.l2": "Outputs of FC2",
    "in_proj.l2": "Outputs of Mamba-2's input projection",
    "out_proj.l2": "Outputs of Mamba-2's output projection",
    "max_logit": "Largest attention logit",
    "entropy": "Entropy of attention",
    "state.norm": "Norm of SSM states",
    "state.max": "Largest number in SSM states",
}
# those of which a layer has quantiles: a line for the median, a band from p5 to p95
QUANTILES = {"dt": "Time step dt", "decay": "Decay exp(dt A)"}
SHARES = {"gate.closed": "Gates closed", "gate.open": "Gates open"}
# of ternary weights, means over the projections of a layer
CODES = {"w.flipped": "Codes that flipped since the last look", "w.zeros": "Codes that are zero"}
UNITS = {"entropy": "nats", **dict.fromkeys((*SHARES, *CODES), "share")}
# layers with a line of their own colour and a name; of the others the lines are thin
NAMED = 4


def write(folder: Path, title: str, provenance: Mapping[str, Value]) -> Path | None:
    """Draw the telemetry of a run into its folder.

    Returns: the page; None if the run has no telemetry.
    """
    rows = read_lines(folder / "telemetry.jsonl")
    if not rows:
        return None
    seconds = sum(row["seconds"] for row in rows)
    words = f"{len(rows)} looks inside the model, {seconds:.2g} s together; a few rows of the batch each."
    html = page(title, "telemetry", [Prose(text=words)], sections(rows), provenance)
    write_whole(folder / "telemetry.html", html)
    return folder / "telemetry.html"


def sections(rows: Sequence[Row]) -> list[Section]:
    """The charts of the lines of a telemetry.jsonl, at least one line."""
    growth = [drawn for name, words in OVER_STEPS.items() if (drawn := _over_steps(rows, name, words))]
    codes = [drawn for name, words in CODES.items() if (drawn := _over_steps(rows, name, words))]
    gates = [drawn for name, words in SHARES.items() if (drawn := _over_steps(rows, name, words))]
    bands = [drawn for name, words in QUANTILES.items() if (drawn := _quantiles(rows, name, words))]
    heads = _by_head(rows[-1])
    found = (
        ("growth", "Outputs, logits and states by layer", growth),
        ("codes", "Ternary weights", codes),
        ("steps", "Time steps, decays and gates of Mamba-2", [*bands, *gates]),
        ("heads", f"Heads of Mamba-2 after step {rows[-1]['step']}", heads),
    )
    return [Section(name=name, title=title, blocks=tuple(blocks)) for name, title, blocks in found if blocks]


def _layers(rows: Sequence[Row], figure: str) -> dict[int, Points]:
    """(step, value) of each layer that has the figure; the mean over its projections where those have it."""
    found: dict[int, dict[float, list[float]]] = {}
    for row in rows:
        for name, value in row["figures"].items():
            match = re.fullmatch(r"blocks\.(\d+)\.(?:mixer\.(?:.+\.)?\w+_proj\.)?(.+)", name)
            # what is not finite is written as a word
            if match and match[2] == figure and isinstance(value, int | float):
                found.setdefault(int(match[1]), {}).setdefault(float(row["step"]), []).append(float(value))
    return {i: [(step, fmean(values)) for step, values in steps.items()] for i, steps in found.items()}


def _chosen(layers: Sequence[int]) -> list[int]:
    """Layers to name: some that lie evenly apart, the first and the last among them."""
    if len(layers) <= NAMED:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (NAMED - 1))] for i in range(NAMED)]


def _over_steps(rows: Sequence[Row], figure: str, words: str) -> Block | None:
    layers = _layers(rows, figure)
    if not layers:
        return None
    named = _chosen(list(layers))
    series = [
        Series(name=f"layer {i}", index=named.index(i), points=points)
        if i in named
        else Series(name="", index=0, points=points, faint=True)
        for i, points in layers.items()
    ]
    is_log = min(value for points in layers.values() for _, value in points) > 0 and figure not in UNITS
    return _chart(words, series, Axis(label="step"), figure, is_log)


def _quantiles(rows: Sequence[Row], figure: str, words: str) -> Block | None:
    low, middle, high = (_layers(rows, f"{figure}.p{p}") for p in (5, 50, 95))
    series = []
    for place, i in enumerate(_chosen(list(middle))):
        # a step at which one end is no finite number has no band
        ends = dict(high.get(i, []))
        band = [(x, a, ends[x]) for x, a in low.get(i, []) if x in ends]
        series.append(Series(name=f"layer {i}", index=place, points=middle[i], band=band))
    if not series:
        return None
    is_log = all(a > 0 for one in series for _, a, _ in one.band)
    return _chart(f"{words}: median, and from p5 to p95", series, Axis(label="step"), figure, is_log and figure == "dt")


def _by_head(row: Row) -> list[Block]:
    """Each head's figures, the heads of a layer in the order of their medians."""
    blocks: list[Block] = []
    for figure, words in {**QUANTILES, "state.norm": "Norm of the state", **SHARES}.items():
        lists = {
            int(match[1]): values
            for name, values in row["heads"].items()
            if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)) and match[2] == figure
        }
        series = []
        for place, i in enumerate(_chosen(list(lists))):
            # quantiles at 0, 5, 50, 95 and 100 %, or one number
            five = [[_number(v) for v in (q if isinstance(q, list) else [q] * 5)] for q in lists[i]]
            five = sorted((q for q in five if all(map(math.isfinite, q))), key=lambda q: q[2])
            points = [(float(h + 1), q[2]) for h, q in enumerate(five)]
            band = [(float(h + 1), q[1], q[3]) for h, q in enumerate(five)] if figure in QUANTILES else ()
            if points:
                series.append(Series(name=f"layer {i}", index=place, points=points, band=band, dots=len(points) < 12))
        if series:
            is_log = figure in ("dt", "state.norm") and min(v for s in series for _, v in s.points) > 0
            is_log = is_log and all(a > 0 for s in series for _, a, _ in s.band)
            blocks.append(_chart(f"{words} by head", series, Axis(label="head, in order"), figure, is_log))
    return blocks


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _chart(title: str, series: Sequence[Series], x: Axis, figure: str, is_log: bool) -> Chart:
    label = UNITS.get(figure, "L2 per token" if figure.endswith(".l2") else "") + (", logarithmic" if is_log else "")
    y = Axis(label=label.removeprefix(", "), show="{:.3g}".format, is_log=is_log)
    return Chart(title=title, svg=line_chart(series, x, y, title=title))
