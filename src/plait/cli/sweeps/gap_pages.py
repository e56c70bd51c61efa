"""The part of a sweep's page on precision: how far each method's loss lies from the baseline's, and when."""

from plait.cli.page.blocks import Block, Chart, Prose, Section, Table
from plait.cli.page.chart import WIDTH, Axis, Series, line_chart
from plait.cli.page.intervals import Row, interval_chart
from plait.cli.sweeps.figures import Method, finished, gap, gap_curve
from plait.cli.sweeps.statistics import Interval

WIDE = 2 * WIDTH
# more bands hide each other
MOST_BANDS = 4


def percent(value: float) -> str:
    """A small share with its sign: +0.52 %."""
    return f"{100 * value:+.2f} %"


def tell(found: dict[str, Method], baseline: Method, reference: Method | None) -> Section:
    """The section; `baseline` is one of the methods, and so is `reference`, whose ablations get a table."""
    others = [method for method in found.values() if method is not baseline]
    words = (
        f"Each run is compared with the run of {baseline.name} of the same seed: the same starting weights, "
        "data and order. The gap is the ratio of final losses minus one; the bars are 95 % t intervals of the mean "
        "over seeds. One seed has no interval."
    )
    if baseline.best_lr is not None:
        words += " Each method is taken at its own best learning rate."
    blocks: list[Block] = [
        Prose(text=words),
        *_charts(others, baseline),
        _table(others, baseline),
    ]
    if reference is not None and reference is not baseline:
        ablations = [method for method in others if method is not reference]
        if ablations:
            blocks.append(_ablations(ablations, reference, baseline))
    return Section(name="gap", title=f"Distance from {baseline.name}", blocks=tuple(blocks))


def _charts(others: list[Method], baseline: Method) -> list[Block]:
    axis = Axis(label=f"loss over that of {baseline.name}", show=lambda v: f"{100 * v:+.3g} %" if v else "0")
    shown = [_row(method, gap(method, baseline)) for method in others]
    blocks: list[Block] = []
    if any(row.value is not None for row in shown):
        drawn = interval_chart(shown, axis, title=f"relative gaps to {baseline.name}", width=WIDE)
        blocks.append(
            Chart(title="At the end of training", svg=drawn, note="mean over seeds, 95 % interval", wide=True)
        )
    curves = {method.name: gap_curve(method, baseline) for method in others}
    has_bands = len(others) <= MOST_BANDS
    series = [
        Series(
            name=method.name,
            index=method.index,
            points=[(at, one.mean) for at, one in curves[method.name]],
            band=_band(curves[method.name]) if has_bands else (),
        )
        for method in others
        if len(curves[method.name]) > 1
    ]
    if series:
        tokens = Axis(label="tokens", show=_short)
        drawn = line_chart(series, tokens, axis, title=f"gap to {baseline.name} over training", width=WIDE, height=400)
        note = "validation losses, paired by seed, mean over seeds" + "; bands: 95 % interval" * has_bands
        blocks.append(Chart(title="Over training", svg=drawn, note=note, wide=True))
    return blocks


def _band(curve: list[tuple[float, Interval]]) -> list[tuple[float, float, float]]:
    return [(at, one.low, one.high) for at, one in curve if one.low is not None and one.high is not None]


def _row(method: Method, found: Interval | None) -> Row:
    if found is None:
        return Row(name=method.name, index=method.index, value=None, word="diverged")
    return Row(name=method.name, index=method.index, value=found.mean, low=found.low, high=found.high)


def _table(others: list[Method], baseline: Method) -> Table:
    rows = [_line(baseline, None, baseline)] + [_line(method, gap(method, baseline), baseline) for method in others]
    return Table(
        caption="Final loss, its distance from the baseline, and the time of a step.",
        head=("method", "seeds", "loss", "gap", "95 % interval", "step time"),
        rows=tuple(rows),
        note="losses in nats per token, mean over seeds; time relative to the baseline, median over all steps",
    )


def _line(method: Method, found: Interval | None, baseline: Method) -> tuple[str, ...]:
    losses = method.losses(method.best_lr)
    good = list(finished(losses).values())
    seeds = f"{len(good)}" if len(good) == len(losses) else f"{len(good)} of {len(losses)}, rest diverged"
    mean = f"{sum(good) / len(good):.4f}" if good else "diverged"
    time = f"{baseline.speed / method.speed:.2f}" if method.speed else ""
    return (method.name, seeds, mean, *_words(found), time)


def _words(found: Interval | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    between = "" if found.low is None or found.high is None else f"{percent(found.low)} to {percent(found.high)}"
    return percent(found.mean), between


def _ablations(ablations: list[Method], reference: Method, baseline: Method) -> Table:
    rows = []
    for method in ablations:
        found = gap(method, reference)
        verdict = "" if found is None or found.low is None else "unclear" if found.holds(0.0) else ""
        verdict = verdict or ("" if found is None or found.low is None else "worse" if found.mean > 0 else "better")
        rows.append((method.name, *_words(found), verdict, _words(gap(method, baseline))[0]))
    return Table(
        caption=f"What each change costs, against {reference.name} of the same seed.",
        head=("method", f"over {reference.name}", "95 % interval", "", f"over {baseline.name}"),
        rows=tuple(rows),
        note="unclear: the interval holds zero",
    )


def _short(tokens: float) -> str:
    return f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens / 1e3:g}k" if tokens >= 1e3 else f"{tokens:g}"
