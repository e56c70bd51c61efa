"""The drawings of a compression's page."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plait.cli.compressing.results import Data, Results
from plait.cli.drawing import count
from plait.cli.page.blocks import Block, Chart, Prose
from plait.cli.page.chart import Axis, Series, line_chart
from plait.cli.page.importance import importance_chart
from plait.cli.page.intervals import Row, interval_chart
from plait.cli.page.scatter import Point, scatter_chart
from plait.cli.plan import PROFILE, THIS

TEACHER, STUDENT, OTHER, CANDIDATE = 7, 0, 1, 2
# points of a training curve
MOST = 60


def models(results: Results) -> tuple[Block, ...]:
    """Loss against memory, and against the time of a step, of the finished models."""
    return tuple(
        Chart(title=title, svg=svg, note="held-out text; the line joins those that no other beats on both")
        for title, svg in _against(results, [(m["name"], m, m["validation_loss"]) for m in results.models])
    )


def candidates(results: Results) -> tuple[Block, ...]:
    """Loss after the short distillation against loss before it, of what was ranked; quality of everything tried."""
    ranked = results.search["facts"].get("ranked", [])
    points = [
        (one["name"], one["facts"]["costs"], results.shorts[one["name"]])
        for one in [*results.search["plans"], *results.search["baselines"]]
    ]
    blocks: list[Block] = [
        Chart(title=f"{title}, after the short distillation", svg=svg, note="held-out text")
        for title, svg in _against(results, [(name, {"costs": costs}, loss) for name, costs, loss in points])
    ]
    if ranked:
        x, unit = _axis("total_bytes", max(one["costs"]["total_bytes"] for one in ranked))
        drawn = [
            Point(x=one["costs"]["total_bytes"] / unit, y=one["loss"], index=CANDIDATE, faint=i >= results.job.keep)
            for i, one in enumerate(ranked)
        ]
        limit = results.profile["ceilings"].get("total_bytes")
        limit = None if limit is None else limit / unit
        y = Axis(label="nats per token", show="{:.3g}".format)
        chart = scatter_chart(drawn, x, y, title="loss before any training against bytes", limit=limit)
        note = "calibration text; of those within the budget and at its edge; the strong ones were distilled"
        blocks.append(Chart(title="Candidates before any training", svg=chart, note=note))
    return tuple(blocks)


def search(results: Results) -> tuple[Block, ...]:
    """The student beside baselines of the same budget."""
    rows = [
        Row(name=m["name"], index=_shade(m["name"]), value=m["validation_loss"])
        for m in sorted(results.models, key=lambda m: m["validation_loss"])
    ]
    teacher = results.model("teacher")["validation_loss"]
    chart = interval_chart(
        rows, Axis(label="nats per token", show="{:.3g}".format), title="loss by model", zero=teacher
    )
    blocks: list[Block] = []
    if not results.job.full and len(rows) > 2:
        words = (
            "The student had all the tokens and the baselines only the short distillation, so this is no fair race; "
            "after the short distillation alone, see below. full=true distils the baselines as long."
        )
        blocks.append(Prose(text=words))
    blocks.append(Chart(title="Loss on held-out text", svg=chart, note="the upright line is the teacher"))
    scored = [m for m in results.models if m["scores"].get("mean") is not None]
    if scored:
        by_score = sorted(scored, key=lambda m: -m["scores"]["mean"])
        bars = [Row(name=m["name"], index=_shade(m["name"]), value=m["scores"]["mean"]) for m in by_score]
        chart = interval_chart(bars, Axis(label="above chance", show="{:.2f}".format), title="mean score by model")
        blocks.append(Chart(title="Mean score of the tasks above chance", svg=chart, note="0 is guessing, 1 perfect"))
    for limit, points in results.search["facts"].get("fronts", {}).items():
        found = [p for p in points if p["score"] is not None]
        if len(found) > 1:
            x, unit = _axis(limit, max(p["ceiling"] for p in found))
            if limit == "decode_s":
                x = replace(x, label=f"{x.label}, predicted on {machine(results.job.device)}")
            line = [(p["ceiling"] / unit, p["score"]) for p in found]
            series = Series(name="expected", index=STUDENT, points=line, dots=True)
            y = Axis(label="nats per token", show="{:.3g}".format)
            svg = line_chart([series], x, y, title=f"expected harm against {limit}")
            note = "each point a search of its own over the same library, under this one limit; before any training"
            blocks.append(Chart(title="What each budget would cost", svg=svg, note=note))
    return tuple(blocks)


def learning(results: Results) -> tuple[Block, ...]:
    """Training losses of the candidates and of the student."""
    shorts, finals = [], []
    for name, points in results.curves().items():
        kind, _, who = name.partition("-")
        series = Series(name=who or "student", index=len(shorts), points=_smooth(points))
        if kind == "short":
            shorts.append(series)
        elif kind == "distil" or kind == "extend":
            finals.append(Series(name=who or "student", index=_shade(who or "student"), points=_smooth(points)))
    x = Axis(label="tokens", show=count)
    y = Axis(label="nats per token", show="{:.3g}".format)
    teaching = results.job.teaching
    note = f"forward KL share {teaching.share:g}, temperature {teaching.temperature:g}, {teaching.precision}; smoothed"
    blocks: list[Block] = []
    for title, several in (
        ("Short distillation of each", shorts),
        ("The student, and whatever had all tokens", finals),
    ):
        if several:
            svg = line_chart(several, x, y, title=title.lower())
            blocks.append(Chart(title=title, svg=svg, note=note))
    return tuple(blocks)


def importance(results: Results) -> tuple[Block, ...]:
    """What layers are worth, by kind, and which of them go."""
    scores = results.scores()
    chosen = next(one for one in results.search["plans"] if one["name"] == results.choice["chosen"])
    gone = set(range(len(scores.config.layers))) - set(chosen["plan"]["kept"])
    names = {
        "mse": ("What the logits lose without a layer", "mean square error"),
        "loss": ("What the loss rises by without a layer", "nats per token"),
        "cosine": ("How much a layer turns the stream", "1 - cosine of what enters and leaves"),
    }
    blocks: list[Block] = []
    for measure, (title, label) in names.items():
        values = scores.layers.get(measure, ())
        if any(value > 0 for value in values):
            svg = importance_chart(scores.config.pattern, values, title=title, label=label, gone=gone, is_log=True)
            note = f"{scores.tokens:,} tokens; hollow layers go"
            blocks.append(Chart(title=title, svg=svg, note=note, wide=True))
    return tuple(blocks)


_WHAT = {"total_bytes": "under the load", "decode_s": "of a decode step"}
_UNITS = {
    "total_bytes": (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)),
    "decode_s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
}


def _axis(field: str, most: float) -> tuple[Axis, float]:
    """An axis in a unit in which its values are plain numbers, and what that unit stands for."""
    unit, scale = next(((u, s) for u, s in _UNITS[field] if most >= s), _UNITS[field][-1])
    return Axis(label=f"{unit} {_WHAT[field]}", show="{:g}".format), scale


def _against(results: Results, found: Sequence[tuple[str, Data, float]]) -> list[tuple[str, str]]:
    """(title, drawing) of loss against bytes and, where times are known, against a step."""
    drawn = []
    for field, title in (("total_bytes", "Loss against memory"), ("decode_s", "Loss against the time of a step")):
        values = [(name, _cost(model, field), loss) for name, model, loss in found]
        if any(value is None or value != value for _, value, _ in values):
            continue
        # a ceiling on predicted times says nothing about measured ones
        is_measured = field == "decode_s" and any(m.get("measured") for _, m, _ in found)
        x, unit = _axis(field, max(value or 0.0 for _, value, _ in values))
        if field == "decode_s":
            where = "measured here" if is_measured else f"predicted on {machine(results.job.device)}"
            x = replace(x, label=f"{x.label}, {where}")
        points = [Point(x=(value or 0.0) / unit, y=y, name=name, index=_shade(name)) for name, value, y in values]
        limit = results.profile["ceilings"].get(field)
        limit = None if limit is None or is_measured else limit / unit
        y = Axis(label="nats per token", show="{:.3g}".format)
        drawn.append((title, scatter_chart(points, x, y, title=title.lower(), limit=limit)))
    return drawn


def machine(device: str) -> str:
    """What to call a job's device."""
    return "this machine" if device == THIS else Path(device).stem if Path(device).suffix == PROFILE else device.upper()


def _cost(model: Data, field: str) -> float | None:
    measured = model.get("measured")
    return measured[field] if measured and field in measured else model["costs"][field]


def _shade(name: str) -> int:
    if name in ("teacher", "student"):
        return TEACHER if name == "teacher" else STUDENT
    return CANDIDATE if name.isdecimal() else OTHER


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    width = max(1, len(points) // MOST)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(float(group[-1][0]), statistics.fmean(loss for _, loss in group)) for group in groups]
