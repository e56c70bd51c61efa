"""`plait tokenize`: turn text files, trees, JSONL and Parquet into token shards that training reads.

OUT/train, OUT/valid     token shards; documents fall on a side by a hash of their text
OUT/tokenizer            the tokenizer they were written with
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from plait.cli.launch import arg
from plait.data.corpus import Corpus
from plait.data.prepare import Prepared, tokenize_documents, train_tokenizer
from plait.data.sources.compressed import PACKED
from plait.report import Report
from plait.text.tokenizer import Tokenizer

EXAMPLE = """plait tokenize my_texts/ more.jsonl.zst --out tokens --train-vocab 4096
  plait tokenize books.parquet --field body --out tokens --tokenizer path/to/tokenizer"""

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to read, with which vocabulary, and where to write."""

    sources: tuple[Path, ...] = arg(help="files or folders: text, .jsonl(.zst|.gz), .parquet", positional=True)
    out: Path = arg(help="folder to make")
    tokenizer: Path | None = arg(default=None, help="folder with a tokenizer.json, or the file")
    train_vocab: int | None = arg(default=None, help="train a byte-level BPE of this many ids on the text instead")
    field: str = arg(default="text", help="field or column with the text, in JSONL and Parquet")
    valid: float = arg(default=0.02, help="share of documents to hold out for validation")
    jobs: int = arg(default=os.cpu_count() or 1, help="threads that encode")
    force: bool = arg(default=False, help="replace an earlier result in the output folder")

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.train_vocab is None):
            raise ValueError("which vocabulary? give one of --tokenizer PATH and --train-vocab SIZE")
        if not 0 <= self.valid < 1:
            raise ValueError(f"valid={self.valid}: must be a share from 0 to below 1, such as 0.02")
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs}: must be at least 1")


def run(inputs: Inputs) -> Report:
    """Tokenize; what cannot work is refused before the first text is read."""
    corpus = Corpus.of(inputs.sources, inputs.field)
    size, skipped = inputs.train_vocab, Counter[str]()
    opened = Tokenizer.open(inputs.tokenizer) if inputs.tokenizer is not None else None
    with _progress(corpus) as show:
        prepared = tokenize_documents(
            corpus.read(skipped),
            opened or (lambda: train_tokenizer(corpus, size or 0, valid=inputs.valid)),
            inputs.out,
            valid=inputs.valid,
            jobs=inputs.jobs,
            replace=inputs.force,
            skipped=skipped,
            on_progress=show,
        )
    report = Report(f"tokens in {inputs.out}")
    report.add("documents", prepared.documents)
    report.add("held out", prepared.valid_documents, "documents")
    report.add("tokens", prepared.tokens)
    report.add("held out tokens", prepared.valid_tokens)
    report.add("bytes per token", prepared.bytes_per_token)
    report.add("vocabulary", Tokenizer.open(inputs.out / "tokenizer").vocab_size)
    report.add("seconds", prepared.seconds, "s")
    report.add("speed", prepared.bytes / max(prepared.seconds, 1e-9) / 1e6, "MB/s")
    for reason, count in sorted(skipped.items()):
        report.add(f"left out: {reason}", count)
    return report


@contextmanager
def _progress(corpus: Corpus) -> Iterator[Callable[[Prepared], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    # what packed files hold is not known before they are read
    packed = any(file.path.suffix in (*PACKED, ".parquet") for file in corpus.files)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )
    with bar:
        task = bar.add_task("reading", total=None if packed else corpus.size_bytes())
        yield lambda prepared: bar.update(task, completed=prepared.bytes, description=_line(prepared))


def _lines() -> Callable[[Prepared], None]:
    due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def show(prepared: Prepared) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(_line(prepared), file=sys.stderr, flush=True)

    return show


def _line(prepared: Prepared) -> str:
    return f"{prepared.documents:,} documents, {prepared.tokens:,} tokens, {prepared.bytes / 1e6:,.1f} MB"
