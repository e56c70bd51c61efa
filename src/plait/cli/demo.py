"""`plait demo`: the whole story on this machine in minutes: read, train twins, compare, complete, export, report.

The story is a list of chapters (plait/cli/chapters); the page that they make together is OUT/report.html.
"""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from plait.cli.chapters import CHAPTERS
from plait.cli.chapters.story import FULL, HYBRID, OURS, QUICK, TWIN, Story
from plait.cli.chapters.text import collect
from plait.cli.launch import arg
from plait.cli.page.blocks import Block, Patterns, Section, Table
from plait.cli.page.render import page, write_json, write_whole
from plait.cli.quiet import quiet
from plait.report import Report, provenance

EXAMPLE = """plait demo
  plait demo --text path/to/my/folder --minutes 10"""

MARK = ".plait-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """On which text, for how long, and where the report goes."""

    text: Path | None = arg(default=None, help="folder of your own text (default: the Python standard library)")
    out: Path = arg(default=Path("runs/demo"), help="folder for everything that is written")
    minutes: float = arg(default=4.0, help="how long it may take")
    seed: int = arg(default=0, help="of weights, order of data and samples")
    quick: bool = arg(default=False, help="a miniature of the story, in less than a minute")

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e5:
            raise ValueError(f"minutes={self.minutes}: give a number above 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: give a number from 0 to below 2**63")
        if self.text is not None and not self.text.is_dir():
            what = "is a file" if self.text.exists() else "does not exist"
            raise ValueError(f"text={self.text} {what}; give a folder of text")


def run(inputs: Inputs) -> Report:
    """Tell the story; the report is written at the end, or, when interrupted, with the chapters told so far."""
    began = time.monotonic()
    scale = QUICK if inputs.quick else FULL
    # nothing of an earlier demo goes before it is known that this one can be told
    check(inputs.out, inputs.text)
    collected = collect(inputs.text, scale.max_text, without=inputs.out)
    prepare(inputs.out)
    story = Story(
        text=inputs.text,
        collected=collected,
        out=inputs.out,
        minutes=inputs.minutes,
        seed=inputs.seed,
        scale=scale,
        report=Report("plait demo", provenance=provenance(inputs.seed)),
        console=Console(stderr=True),
        began=began,
    )
    sections: list[Section] = []
    try:
        with quiet("plait.train", "plait.engine", below=logging.ERROR), story.threads:
            for number, (name, tell) in enumerate(CHAPTERS.items(), 1):
                story.console.print(f"[bold]{number}/{len(CHAPTERS)} {name}[/bold]", highlight=False)
                begun = time.monotonic()
                sections.append(tell(story))
                story.report.add(f"chapter {name}", time.monotonic() - begun, "s")
    except KeyboardInterrupt:
        if story.models:
            write(story, sections, "stopped early")
        raise
    story.report.add("whole story", time.monotonic() - story.began, "s")
    path = write(story, sections)
    story.say(f"the report is {path.resolve()}")
    return summary(story, path)


def check(out: Path, text: Path | None) -> None:
    """See that a demo may write into the folder, and change nothing.

    Raises: ValueError if it holds anything that no demo wrote, is a file, or cannot be written.
    """
    if text is not None and (text.resolve() == out.resolve() or out.resolve() in text.resolve().parents):
        raise ValueError(f"text={text} lies inside out={out}; write the report elsewhere with --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; choose another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"out={out} holds other things than a demo; choose another folder with --out")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out={out}: no permission to write in {nearest}; choose another folder with --out")


def prepare(out: Path) -> None:
    """Make the folder, which was checked, ready: what an earlier demo wrote there goes."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / MARK, "this folder was made by plait demo, which may replace what it wrote\n")
    for name in OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write(story: Story, sections: list[Section], remark: str = "") -> Path:
    """Write report.json and report.html; returns the page."""
    facts = story.report
    title = "A hybrid and its Transformer twin"
    given = facts.provenance
    of = f"the text in {story.text.name}" if story.text else "the source of Python's standard library"
    subtitle = (
        f"Two small language models of equal size, trained on {of} and measured on one machine "
        f"({given['device']}), {str(given['time'])[:10]}." + (f" {remark.capitalize()}." if remark else "")
    )
    write_json(story.out / "report.json", facts, curves=story.curves, headline=story.headline)
    html = page(title, subtitle, opening(story), sections, given)
    write_whole(story.out / "report.html", html)
    return story.out / "report.html"


def opening(story: Story) -> list[Block]:
    """The picture of both patterns, and the headline table."""
    words = {"M": "Mamba-2", "*": "attention", "-": "feed-forward", "E": "experts"}
    models = {name: story.models[name].config for name in (HYBRID, TWIN) if name in story.models}
    used = "".join(config.pattern for config in models.values())
    rows = tuple(
        (
            name,
            config.pattern,
            f"{len(config.layers)} layers of width {config.d_model}, {config.cost().params:,} parameters",
        )
        for name, config in models.items()
    )
    blocks: list[Block] = [Patterns(models=rows, legend=tuple((k, v) for k, v in words.items() if k in used))]
    if story.headline:
        caption = "The same text, the same number of parameters, the same training."
        blocks.append(Table(caption=caption, head=("", HYBRID, TWIN), rows=tuple(story.headline)))
    return blocks


def summary(story: Story, path: Path) -> Report:
    """What the terminal shows at the end: the headline and where the report is."""
    report = Report(f"plait demo: {path}", provenance=story.report.provenance)
    wanted = ("parameters", "validation loss", "training speed", "decode speed", "cache at", "whole story", "logit")
    for fact in story.report.facts:
        if any(part in fact.name for part in wanted):
            report.facts.append(fact)
    report.add("report", str(path))
    return report
