"""The part of a sweep's page on what goes on inside: outputs that grow before a run diverges, values that numbers lose.

It is drawn from the telemetry.jsonl of the runs, and left out where they wrote none.
"""

import re

from plait.cli.page.blocks import Block, Chart, Prose, Section, Table
from plait.cli.page.chart import Axis, Series, line_chart
from plait.cli.sweeps.figures import Method, Points, inside, over_layers
from plait.cli.sweeps.rate_pages import edge_of

Inside = dict[str, dict[str, Points]]
# what is drawn of a diverging run, in this order; others follow in the order of the file
FIRST = ("qkv.l2", "proj.l2", "fc1.l2", "fc2.l2", "max_logit", "entropy", "in_proj.l2", "out_proj.l2", "dt", "decay")
MOST_CHARTS = 16
PLAIN = ("decay", "entropy", "gate.closed", "gate.open")
QUANTILE = re.compile(r"\.p[0-9]+$")
# x, w, dy: input, weight and output gradient of a linear layer in few bits
LOST = re.compile(r"(.+)\.(x|w|dy)\.(underflow|saturation|amax)")
SPOKEN = {
    "l2": "output norm",
    "max_logit": "Largest attention logit",
    "entropy": "Attention entropy, nats",
    "dt": "Time steps dt of Mamba-2",
    "decay": "Decay exp(dt A) of Mamba-2",
    "state.norm": "Norm of Mamba-2's states",
    "state.max": "Largest value in Mamba-2's states",
    "gate.closed": "Share of gates that are closed",
    "gate.open": "Share of gates that are open",
}
OPERANDS = {"x": "inputs", "w": "weights", "dy": "gradients"}
STATISTICS = {
    "underflow": ("flushed to zero", "share of values that are not zero"),
    "saturation": ("at the largest number", "share of values"),
    "amax": ("largest magnitude", "absolute value"),
}


def growth(baseline: Method, worse: float) -> Section | None:
    """How outputs grow at the first rate that is not stable, against the largest that is; None without telemetry."""
    found = edge_of(baseline, worse)
    runs: dict[str, Inside] = {}
    for word, lr in (("stable", found.stable), ("unstable", found.unstable)):
        if lr is not None:
            # the first seed, but one that diverged tells more
            seeds = sorted(baseline.by_lr[lr].values(), key=lambda done: done.result.status)
            runs[f"{word}, {lr:g}"] = inside(seeds[0].folder)
    # dt.p5, dt.p50 and so on are one quantity
    quantities = [QUANTILE.sub("", name) for figures in runs.values() for name in figures if not LOST.fullmatch(name)]
    names = sorted(dict.fromkeys(quantities), key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    charts = [chart for name in names[:MOST_CHARTS] if (chart := _growth_chart(name, runs))]
    if not charts:
        return None
    words = (
        f"{baseline.name} at its largest stable and its first unstable learning rate: means over layers, thin lines "
        "single layers of the unstable run; bands reach from the 5th to the 95th percentile over tokens and heads. "
    )
    left = len(names) - len(charts)
    words += f"{left} further quantities are in telemetry.jsonl of the runs." if left else ""
    return Section(name="growth", title="What grows before a run diverges", blocks=(Prose(text=words), *charts))


def _growth_chart(name: str, runs: dict[str, Inside]) -> Chart | None:
    series: list[Series] = []
    for index, (word, figures) in enumerate(runs.items()):
        layers = figures.get(name) or figures.get(f"{name}.p50")
        if not layers:
            continue
        if name not in figures:
            # a step at which one end is no finite number has no band
            low, high = (dict(over_layers(figures.get(f"{name}.{end}", {}))) for end in ("p5", "p95"))
            band = [(step, low[step], high[step]) for step in low if step in high]
            series.append(Series(name=word, index=index, points=over_layers(layers), band=band))
            continue
        if word.startswith("unstable") and len(layers) > 1:
            series += [Series(name="", index=index, points=points, faint=True) for points in layers.values()]
        series.append(Series(name=word, index=index, points=over_layers(layers)))
    if not series:
        return None
    lowest = [value for one in series for _, value in one.points] + [low for one in series for _, low, _ in one.band]
    # shares and probabilities are read best as they are
    is_log = min(lowest) > 0 and name not in PLAIN
    y = Axis(label="logarithmic" if is_log else "", show=_short, is_log=is_log)
    drawn = line_chart(series, Axis(label="step"), y, title=f"{name} by step")
    return Chart(title=_spoken(name), svg=drawn, note="one seed")


def losses_of_numbers(method: Method) -> Section | None:
    """Underflow, saturation and amax of a method's linear layers over time; None without such telemetry."""
    done = next(iter(method.by_lr[method.best_lr].values()))
    figures = inside(done.folder)
    blocks: list[Block] = []
    for statistic, (words, label) in STATISTICS.items():
        for operand, what in OPERANDS.items():
            roles = {m[1]: layers for name, layers in figures.items() if (m := _is(name, operand, statistic))}
            series = [
                Series(name=role.rpartition(".")[2], index=index, points=over_layers(layers))
                for index, (role, layers) in enumerate(sorted(roles.items()))
            ]
            if not series:
                continue
            is_log = statistic == "amax" and min(v for one in series for _, v in one.points) > 0
            y = Axis(label=label, show=_short, is_log=is_log)
            drawn = line_chart(series, Axis(label="step"), y, title=f"{what} {words} by step")
            blocks.append(Chart(title=f"{what.capitalize()} {words}", svg=drawn, note="mean over layers, one seed"))
    if not blocks:
        return None
    blocks.append(_tensors(figures))
    return Section(name=f"numbers-{method.index}", title=f"What {method.name} loses", blocks=tuple(blocks))


def _tensors(figures: Inside) -> Table:
    """Every tensor at the last sampled step."""
    last: dict[tuple[str, str, str], dict[str, float]] = {}
    for name, layers in figures.items():
        if match := LOST.fullmatch(name):
            role, operand, statistic = match.groups()
            for layer, points in layers.items():
                last.setdefault((layer, role, operand), {})[statistic] = points[-1][1]
    order = sorted(last, key=lambda key: (int(key[0] or -1), key[1], list(OPERANDS).index(key[2])))
    rows = [
        (
            f"{layer + ' ' if layer else ''}{role} {OPERANDS[operand]}",
            *(_rate(last[layer, role, operand].get(name)) for name in ("underflow", "saturation")),
            f"{last[layer, role, operand].get('amax', float('nan')):.3g}",
        )
        for layer, role, operand in order
    ]
    return Table(
        caption="Every tensor at the last sampled step.",
        head=("layer and tensor", "flushed to zero", "at the largest number", "largest magnitude"),
        rows=tuple(rows),
        note="one seed",
        folded=True,
    )


def _is(name: str, operand: str, statistic: str) -> "re.Match[str] | None":
    match = LOST.fullmatch(name)
    return match if match and match[2] == operand and match[3] == statistic else None


def _short(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _spoken(name: str) -> str:
    place, _, last = name.rpartition(".")
    return SPOKEN.get(name) or f"{place.rpartition('.')[2]} {SPOKEN.get(last, last)}".strip()
