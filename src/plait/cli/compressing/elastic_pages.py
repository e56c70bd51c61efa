"""What an elastic model has come to: its sizes, their losses, and those of models that learnt alone."""

import json
import shutil
from pathlib import Path

from plait.cli.compressing.results import Data
from plait.cli.drawing import count
from plait.cli.page.blocks import Block, Chart, Commands, Prose, Section, Table
from plait.cli.page.chart import Axis, Series, line_chart
from plait.cli.page.render import page, write_json, write_whole
from plait.compress.distill import MODEL
from plait.compress.elastic import Sizes
from plait.compress.nested import FILE
from plait.compress.stages import FILE as STAGE
from plait.formats.checkpoint import Checkpoint
from plait.report import Report, provenance

# a gap that is worth a word
FAR = 0.03


def write(last: Path, out: Path, teacher: str) -> Report:
    """Publish OUT/model, write report.json and report.html; returns the facts."""
    facts: Data = json.loads((last / FILE).read_text(encoding="utf-8"))
    inputs = json.loads((last / STAGE).read_text(encoding="utf-8"))["inputs"]
    made = last.parent / inputs["elastic"] / MODEL
    # the sizes lie inside the folder, and must not outlive its tensors
    shutil.rmtree(out / MODEL, ignore_errors=True)
    Checkpoint.open(made).save(out / MODEL, "native")
    Sizes.open(made).save(out / MODEL)
    report = Report(f"plait compress: {out / MODEL}", provenance=provenance())
    report.add("teacher validation loss", facts["teacher"], "nats/token")
    for row in facts["sizes"]:
        name = row["name"]
        report.add(f"{name} parameters", row["params"])
        report.add(f"{name} validation loss", row["loss"], "nats/token")
        if "alone" in row:
            report.add(f"{name} validation loss, learnt alone", row["alone"], "nats/token")
            report.add(f"{name} gap", 100 * row["gap"], "%")
    write_json(out / "report.json", report, sizes=facts["sizes"])
    head = {**report.provenance, "seed": "-"}
    blocks = (*_blocks(facts), _commands(facts, out))
    sections = [Section(name="sizes", title="Its sizes", blocks=blocks)]
    title, subtitle = f"{teacher}, elastic", "One training run, several sizes, each of which can be cut out."
    write_whole(out / "report.html", page(title, subtitle, [Prose(text=_words(facts))], sections, head))
    report.add("report", str(out / "report.html"))
    return report


def _words(facts: Data) -> str:
    gaps = {row["name"]: row["gap"] for row in facts["sizes"] if "gap" in row}
    if not gaps:
        return "Nothing was distilled by itself to compare the sizes with; --compare does."
    far = [f"{name} by {gap:.1%}" for name, gap in gaps.items() if gap > FAR]
    if far:
        return f"Farther than {FAR:.0%} from a model that learnt alone on the same tokens: {', '.join(far)}."
    return f"Each size is within {FAR:.0%} of the loss of a model that learnt alone on the same tokens."


def _blocks(facts: Data) -> tuple[Block, ...]:
    rows = tuple(
        (
            row["name"],
            row["pattern"],
            count(row["params"]),
            f"{row['loss']:.4f}",
            f"{row['alone']:.4f}" if "alone" in row else "",
            f"{row['gap']:+.2%}" if "gap" in row else "",
        )
        for row in facts["sizes"]
    )
    head = ("", "layers", "parameters", "loss", "learnt alone", "gap")
    table = Table(caption=f"Loss on held-out text; the teacher's is {facts['teacher']:.4f}.", head=head, rows=rows)
    lines = [Series(name="elastic", index=0, points=_points(facts, "loss"), dots=True)]
    if alone := _points(facts, "alone"):
        lines.append(Series(name="alone", index=1, points=alone, dots=True))
    x, y = Axis(label="parameters", show=count), Axis(label="nats per token", show="{:.3g}".format)
    svg = line_chart(lines, x, y, title="loss by size")
    return table, Chart(title="Loss by size", svg=svg, note="held-out text")


def _points(facts: Data, field: str) -> list[tuple[float, float]]:
    return sorted((float(row["params"]), float(row[field])) for row in facts["sizes"] if field in row)


def _commands(facts: Data, out: Path) -> Commands:
    model = (out / MODEL).as_posix()
    names = [row["name"] for row in facts["sizes"][1:]]
    return Commands(
        lines=tuple(
            (f"plait convert {model} size-{name} --to hf --slice {name}", f"The size {name} as a checkpoint of its own")
            for name in names
        )
    )
