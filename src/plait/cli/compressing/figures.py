"""The drawings of a compression's page."""

import statistics
from collections.abc import Sequence

from plait.cli.compressing.results import Data, Results
from plait.cli.drawing import count, size
from plait.cli.page.blocks import Block, Chart, Prose
from plait.cli.page.chart import Axis, Series, line_chart
from plait.cli.page.intervals import Row, interval_chart
from plait.cli.page.scatter import Point, scatter_chart

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
        drawn = [
            Point(x=one["costs"]["total_bytes"], y=one["loss"], index=CANDIDATE, faint=i >= results.job.keep)
            for i, one in enumerate(ranked)
        ]
        x, y = Axis(label="bytes under the load", show=size), Axis(label="nats per token", show="{:.3g}".format)
        limit = results.profile["ceilings"].get("total_bytes")
        chart = scatter_chart(drawn, x, y, title="loss before any training against bytes", limit=limit)
        note = "of those within the budget and at its edge; the strong ones were distilled"
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
            series = Series(
                name="expected", index=STUDENT, points=[(p["ceiling"], p["score"]) for p in found], dots=True
            )
            show = size if limit == "total_bytes" else _ms
            x, y = Axis(label=_LABELS[limit], show=show), Axis(label="nats per token", show="{:.3g}".format)
            svg = line_chart([series], x, y, title=f"expected harm against {limit}")
            note = "each point a search of its own over the same library"
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
    """What layers are worth, by kind."""
    scores = results.scores()
    pattern = scores.config.pattern
    shades = {"M": 0, "*": 1, "-": 7, "E": 2}
    blocks: list[Block] = []
    names = {"mse": "MSE of the logits without the layer", "cosine": "1 - cosine of what enters and leaves"}
    for measure, title in names.items():
        values = scores.layers.get(measure)
        if values is None or min(values) <= 0:
            continue
        series = [
            Series(
                name={"M": "Mamba-2", "*": "attention", "-": "feed-forward", "E": "experts"}[letter],
                index=shades[letter],
                points=[(float(i), values[i]) for i, other in enumerate(pattern) if other == letter],
                dots=True,
            )
            for letter in dict.fromkeys(pattern)
        ]
        y = Axis(label="importance, logarithmic", is_log=True, show="{:.0e}".format)
        svg = line_chart(series, Axis(label="layer"), y, title=f"importance of layers: {title}")
        blocks.append(Chart(title=title, svg=svg, note=f"{scores.tokens:,} tokens"))
    return tuple(blocks)


_LABELS = {"total_bytes": "bytes under the load", "decode_s": "seconds of a decode step"}


def _against(results: Results, found: Sequence[tuple[str, Data, float]]) -> list[tuple[str, str]]:
    """(title, drawing) of loss against bytes and, where times are known, against a step."""
    drawn = []
    for field, title, show in (
        ("total_bytes", "Loss against memory", size),
        ("decode_s", "Loss against the time of a step", _ms),
    ):
        values = [(name, _cost(model, field), loss) for name, model, loss in found]
        if any(value is None or value != value for _, value, _ in values):
            continue
        points = [Point(x=value or 0.0, y=loss, name=name, index=_shade(name)) for name, value, loss in values]
        limit = results.profile["ceilings"].get(field) if not any(m.get("measured") for _, m, _ in found) else None
        x, y = Axis(label=_LABELS[field], show=show), Axis(label="nats per token", show="{:.3g}".format)
        drawn.append((title, scatter_chart(points, x, y, title=title.lower(), limit=limit)))
    return drawn


def _cost(model: Data, field: str) -> float | None:
    measured = model.get("measured")
    return measured[field] if measured and field in measured else model["costs"][field]


def _shade(name: str) -> int:
    if name in ("teacher", "student"):
        return TEACHER if name == "teacher" else STUDENT
    return CANDIDATE if name.isdecimal() else OTHER


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    width = max(1, len(points) // MOST)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(float(group[-1][0]), statistics.fmean(loss for _, loss in group)) for group in groups]
