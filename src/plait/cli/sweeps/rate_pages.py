"""The part of a sweep's page on stability: final loss against the learning rate, and how large a rate may be."""

from plait.cli.page.blocks import Block, Chart, Prose, Section, Table
from plait.cli.page.chart import WIDTH, Axis, Series, line_chart
from plait.cli.sweeps.figures import Method, finished
from plait.cli.sweeps.statistics import Edge, edge, sensitivity
from plait.cli.sweeps.table import Sweep

HEAD = ("method", "best loss", "at rate", "largest stable", "first unstable", "ratio", "sensitivity")


def tell(found: dict[str, Method], sweep: Sweep, baseline: Method, grid: list[float]) -> Section:
    """The section. baseline: whose largest stable rate is 1 in the table. grid: the rates that all methods tried."""
    worse = sweep.stable.worse
    words = (
        "A line is the mean over seeds, its band the lowest and highest seed; a cross above is a rate at which a run "
        "diverged and was ended early (run.spikes.diverged_above). A rate is stable if no seed diverged and every seed "
        f"ends within {worse:g} nats of the method's best rate. The sensitivity is the mean over the rates that all "
        "methods tried of min(loss, loss at the start) minus the best loss (Wortsman et al. 2023); a diverged run "
        "counts with the loss at the start."
    )
    blocks: list[Block] = [Prose(text=words)]
    series = [one for method in found.values() if (one := _series(method))]
    if any(one.points for one in series):
        x = Axis(label="learning rate", show="{:g}".format, is_log=True)
        y = Axis(label="final loss, nats per token", show="{:.3g}".format)
        drawn = line_chart(series, x, y, title="final loss by learning rate", width=2 * WIDTH, height=460)
        blocks.append(Chart(title="Final loss by learning rate", svg=drawn, note="validation", wide=True))
    edges = {name: edge_of(method, worse) for name, method in found.items()}
    blocks.append(
        Table(
            caption="How large the learning rate may be.",
            head=HEAD,
            rows=tuple(_row(method, edges[name], edges[baseline.name], grid) for name, method in found.items()),
            note=f"ratio: largest stable rate over that of {baseline.name}; > says that every tried rate was stable",
        )
    )
    return Section(name="rates", title="How large the learning rate may be", blocks=tuple(blocks))


def edge_of(method: Method, worse: float) -> Edge:
    """Where the method's stability ends."""
    return edge({lr: list(method.losses(lr).values()) for lr in method.by_lr if lr is not None}, worse)


def sensitivity_of(method: Method, grid: list[float]) -> float | None:
    """LR sensitivity over the grid, of means over seeds; a rate at which a seed diverged counts that seed so."""
    first = method.first_loss
    # a sweep that was stopped has not tried them all
    if first is None or any(lr not in method.by_lr for lr in grid):
        return None
    means: dict[float, float | None] = {}
    for lr in grid:
        losses = list(method.losses(lr).values())
        known = [min(first if loss is None else loss, first) for loss in losses]
        means[lr] = None if not any(loss is not None for loss in losses) else sum(known) / len(known)
    return sensitivity(means, first)


def _series(method: Method) -> Series | None:
    points, band, crosses = [], [], []
    for lr in method.by_lr:
        if lr is None:
            continue
        losses = method.losses(lr)
        good = list(finished(losses).values())
        if good:
            points.append((lr, sum(good) / len(good)))
            band.append((lr, min(good), max(good)))
        if len(good) < len(losses):
            crosses.append(lr)
    if not points and not crosses:
        return None
    return Series(name=method.name, index=method.index, points=points, band=band, crosses=crosses, dots=True)


def _row(method: Method, found: Edge, theirs: Edge, grid: list[float]) -> tuple[str, ...]:
    best = method.best_lr
    good = list(finished(method.losses(best)).values())
    score = sensitivity_of(method, grid)
    beyond = "> " if found.unstable is None and found.stable is not None else ""
    ratio = f"{beyond}{found.stable / theirs.stable:.2f}" if found.stable and theirs.stable else ""
    return (
        method.name,
        f"{sum(good) / len(good):.3f}" if good else "diverged",
        f"{best:g}" if good else "",
        f"{beyond}{found.stable:g}" if found.stable else "none",
        "" if found.unstable is None else f"{found.unstable:g}",
        ratio,
        "" if score is None else f"{score:.3f}",
    )
