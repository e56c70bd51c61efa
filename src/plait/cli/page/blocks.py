"""What a page is made of: sections of blocks, plain data that the template draws."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One thing on the page. kind: which part of the template draws it."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose(Block):
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Block):
    """Rows of words and numbers; the first column is left-aligned, the others right.

    note: how it was measured. folded: hidden until somebody opens it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart(Block):
    """A drawing by chart.py. title: what it shows, as a sentence. note: how it was measured. wide: over all columns."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: str
    note: str = ""
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns(Block):
    """Layer patterns under each other: (name, one letter per layer, what to say about it)."""

    kind: ClassVar[str] = "patterns"
    models: tuple[tuple[str, str, str], ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces(Block):
    """A text with its tokens made visible."""

    kind: ClassVar[str] = "pieces"
    caption: str
    pieces: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage(Block):
    """The end of a prompt, and how it goes on: truly, and by each model."""

    kind: ClassVar[str] = "passage"
    where: str
    prompt: str
    answers: tuple[tuple[str, str], ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands(Block):
    """Lines to paste into a terminal, each with what it does."""

    kind: ClassVar[str] = "commands"
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A chapter of the page."""

    name: str
    title: str
    blocks: tuple[Block, ...]
