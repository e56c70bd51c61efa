"""What the chapters of `plait demo` pass on to each other: the plan, the folder, the models, and what was measured.

A chapter is a function `tell(story) -> Section`. It reads what earlier chapters left, measures, adds facts to
`story.report` and rows to the headline table, and returns its part of the page. Files go into `story.out`, under names
that `OURS` lists, and nowhere else.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from plait.cli.machine import Threads
from plait.data.document import Document
from plait.model.hybrid import Hybrid
from plait.report import Report

HYBRID, TWIN = "hybrid", "Transformer"
# everything that a demo writes below its folder; a later demo in the same folder removes exactly these
OURS = ("data", "hybrid", "transformer", "hybrid-hf", "hybrid-ternary", "hybrid-compressed")
OURS += ("hybrid-session.safetensors",)
OURS += ("report.html", "report.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the story is.

    vocab_size: of the tokenizer, at most. d_model, pattern: of the hybrid. seq_len, batch_size: of training.
    contexts: tokens in the cache where decoding is measured. max_text: bytes of text to use. max_steps: of training.
    decode_steps: tokens that are timed for each model, context and round. completion_tokens, passages: of the samples.
    """

    vocab_size: int = 2048
    d_model: int = 192
    pattern: str = "M-M-M*-M-M-"
    seq_len: int = 512
    batch_size: int = 4
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    max_text: int = 24 << 20
    max_steps: int = 20000
    decode_steps: int = 12
    completion_tokens: int = 64
    passages: int = 3


FULL = Scale()
QUICK = Scale(
    vocab_size=512,
    d_model=64,
    seq_len=64,
    batch_size=2,
    contexts=(256, 512, 1024),
    max_text=1 << 19,
    max_steps=8,
    decode_steps=3,
    completion_tokens=8,
    passages=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The documents of the story, in memory. total_bytes: of all files found, of which max_text may have been taken."""

    documents: list[Document]
    n_files: int
    total_bytes: int
    skipped: Counter[str]

    @property
    def n_bytes(self) -> int:
        """Bytes of text."""
        return sum(len(document.text.encode()) for document in self.documents)


@dataclass(slots=True, kw_only=True)
class Story:
    """One telling.

    text: the user's folder, None for the Python standard library. collected: what was read there. out: where
    everything goes. minutes: how long the whole may take. threads: how many pay. models: by HYBRID and TWIN, from
    the chapter that trains them on. headline: rows of the table at the top: (what, hybrid, Transformer).
    """

    text: Path | None
    collected: Text
    out: Path
    minutes: float
    seed: int
    scale: Scale
    report: Report
    console: Console
    threads: Threads = field(default_factory=Threads)
    models: dict[str, Hybrid] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    headline: list[tuple[str, str, str]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def train_data(self) -> Path:
        """Token shards to train on."""
        return self.out / "data" / "train"

    @property
    def valid_data(self) -> Path:
        """Token shards held out."""
        return self.out / "data" / "valid"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.out / "data" / "tokenizer"

    def say(self, line: str) -> None:
        """Tell the reader at the terminal how it goes."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def compare(self, what: str, shown: Mapping[str, str], values: Mapping[str, float], unit: str, n: int = 1) -> None:
        """Put one measurement of both models into the headline table and the report.

        Args:
            what: its name.
            shown: by model, as words for people; empty leaves the table alone.
            values, unit, n: as of a Fact, by model.
        """
        if shown:
            label = f"{what}, {unit}" if unit else what
            self.headline.append((label, shown[HYBRID], shown[TWIN]))
        for name, value in values.items():
            self.report.add(f"{name} {what}", value, unit, n)
