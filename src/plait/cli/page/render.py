"""Turns sections into one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from plait.cli.page.blocks import Block, Section
from plait.report import Report, Value


def page(
    title: str, subtitle: str, opening: Sequence[Block], sections: Sequence[Section], provenance: Mapping[str, Value]
) -> str:
    """Draw a page.

    Args:
        title, subtitle: its head.
        opening: blocks before the first section.
        sections: the chapters.
        provenance: where the figures come from, as of `plait.report.provenance`; stands under each of them.
    """
    here = files("plait.cli.page")
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # our own drawings and style sheet are markup; everything else is text and gets escaped
    environment.filters["drawing"] = Markup
    template = environment.from_string((here / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        subtitle=subtitle,
        opening=opening,
        sections=sections,
        provenance=provenance,
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, report: Report, **more: object) -> None:
    """Write a report's facts, and whatever else belongs to them, as one JSON object."""
    write_whole(path, json.dumps({**report.to_dict(), **more}, ensure_ascii=False, indent=1, allow_nan=False))
