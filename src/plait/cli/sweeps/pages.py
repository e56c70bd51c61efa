"""What a sweep says in the end: facts for the terminal and for other programs, and a page with tables and charts."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from plait.cli.page.blocks import Block, Commands, Prose, Section, Table
from plait.cli.page.render import page, write_json, write_whole
from plait.cli.sweeps import gap_pages, inside_pages, rate_pages
from plait.cli.sweeps.figures import Method, differing, finished, gap, methods
from plait.cli.sweeps.runner import Done
from plait.cli.sweeps.table import Sweep
from plait.report import Report, Value, provenance
from plait.train.metrics import clock


def report_of(sweep: Sweep, done: Sequence[Done], grid: Sequence[float], title: str) -> Report:
    """The facts of a sweep: of each method its loss, its gap, and how large its rate may be.

    Args:
        sweep: what was asked.
        done: all runs.
        grid: learning rates that all methods tried; empty where the rate does not vary.
        title: of the report.
    """
    found = methods(done)
    seeds = ", ".join(dict.fromkeys(str(one.trial.seed) for one in done))
    given: dict[str, Value] = provenance() | {"seed": seeds}
    report = Report(title, provenance=given)
    report.add("runs", len(done))
    report.add("diverged", sum(one.result.status == "diverged" for one in done))
    for name, method in found.items():
        good = list(finished(method.losses(method.best_lr)).values())
        if good:
            spread = statistics.stdev(good) if len(good) > 1 else None
            report.add(f"{name} loss", sum(good) / len(good), "nats/token", len(good), spread)
        baseline = found.get(sweep.baseline)
        if baseline not in (None, method) and (pair := gap(method, baseline)):
            report.add(f"{name} gap", 100 * pair.mean, "%", pair.n)
            if pair.low is not None and pair.high is not None:
                report.add(f"{name} gap, low", 100 * pair.low, "%", pair.n)
                report.add(f"{name} gap, high", 100 * pair.high, "%", pair.n)
        if grid:
            edge = rate_pages.edge_of(method, sweep.stable.worse)
            report.add(f"{name} best rate", method.best_lr)
            report.add(f"{name} largest stable rate", edge.stable)
            report.add(f"{name} first unstable rate", edge.unstable)
            report.add(f"{name} LR sensitivity", rate_pages.sensitivity_of(method, list(grid)), "nats/token")
    report.add("seconds", sum(one.result.seconds for one in done), "s")
    return report


def write(sweep: Sweep, done: Sequence[Done], grid: Sequence[float], report: Report, out: Path) -> Path:
    """Write report.json and report.html; returns the page."""
    found = methods(done)
    table = [
        {"run": one.trial.name, "method": one.trial.method, "seed": one.trial.seed, "lr": one.trial.lr}
        | {"status": one.result.status, "loss": one.result.loss, "steps": one.result.step}
        for one in done
    ]
    write_json(out / "report.json", report, runs=table)
    sections = [section for section in _sections(sweep, found, list(grid)) if section is not None]
    sections += [_runs(done), _again(out)]
    title = sweep.title or "A sweep"
    lost = sum(one.result.status == "diverged" for one in done)
    subtitle = (
        f"{len(done)} runs of one recipe, {len(found)} methods, seeds {report.provenance['seed']}"
        f"{f', {lost} diverged' if lost else ''}; {report.provenance['device']}, "
        f"{str(report.provenance['time'])[:10]}."
    )
    opening: list[Block] = [Prose(text=paragraph) for paragraph in sweep.about.strip().split("\n\n") if paragraph]
    differ = [name for name in differing(done) if name not in ("seed", "run.schedule.peak")]
    if differ:
        opening.append(Prose(text=f"The runs differ in {', '.join(differ)}; everything else is the same in all."))
    html = page(title, subtitle, opening, sections, report.provenance)
    write_whole(out / "report.html", html)
    return out / "report.html"


def _sections(sweep: Sweep, found: dict[str, Method], grid: list[float]) -> list[Section | None]:
    first = next(iter(found.values()))
    baseline, reference = found.get(sweep.baseline), found.get(sweep.reference)
    sections: list[Section | None] = []
    if grid:
        sections.append(rate_pages.tell(found, sweep, baseline or first, grid))
    if baseline is not None and len(found) > 1:
        sections.append(gap_pages.tell(found, baseline, reference))
    if grid:
        sections.append(inside_pages.growth(baseline or first, sweep.stable.worse))
    sections += [inside_pages.losses_of_numbers(method) for method in found.values()]
    return sections


def _runs(done: Sequence[Done]) -> Section:
    rows = tuple(
        (
            one.trial.name,
            one.result.status,
            f"{one.result.step:,}",
            "" if one.result.loss is None else f"{one.result.loss:.4f}",
            clock(one.result.seconds),
            f"{one.result.tokens_per_s:,.0f}",
        )
        for one in done
    )
    head = ("run", "", "steps", "final loss", "time", "tokens/s")
    caption = f"The {len(rows)} runs, each a folder of its own under runs/."
    table = Table(caption=caption, head=head, rows=rows, folded=len(rows) > 20)
    return Section(name="runs", title="All runs", blocks=(table,))


def _again(out: Path) -> Section:
    lines = (
        (f"plait train {out.as_posix()}/runs/RUN/settings.json --out again", "One of the runs by itself"),
        (f"less {out.as_posix()}/runs/RUN/metrics.jsonl", "Its loss, step by step"),
    )
    return Section(name="again", title="Further", blocks=(Commands(lines=lines),))
