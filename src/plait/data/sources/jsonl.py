"""JSON lines: one object per line, the text in one of its fields."""

import json
from collections.abc import Iterator
from pathlib import Path

from plait.data.document import Document, Skipped, SourceError
from plait.data.sources.compressed import open_bytes

_LINE = 1 << 28


def read(path: Path, field: str, skipped: Skipped) -> Iterator[Document]:
    """Yield the text of each line; `source` and `licence` (or `license`) are taken along where a line has them.

    Args:
        path: the file (.zst and .gz are unpacked).
        field: name of the field with the text.
        skipped: counts lines that are no JSON object, have no such field, or no text in it.

    Raises: SourceError if not even the first line can be read, naming what it holds.
    """
    with open_bytes(path) as file:
        first = True
        # a cap on the line keeps a file without line ends from filling the memory
        while line := file.readline(_LINE):
            if not line.strip():
                continue
            try:
                yield _document(line, field, f"the first line of {path}")
            except SourceError as error:
                if first:
                    raise
                skipped[error.reason] += 1
            first = False
        if first:
            skipped["empty"] += 1


def _document(line: bytes, field: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError("bad JSON", f"{where} is no JSON ({error}); JSONL holds one object per line") from error
    if not isinstance(row, dict):
        raise SourceError("bad JSON", f"{where} is a {type(row).__name__}; JSONL holds one object per line")
    if field not in row:
        raise SourceError(f"no field {field!r}", f"{where} has no field {field!r}, only {', '.join(row)}; set --field")
    text = row[field]
    if not isinstance(text, str):
        raise SourceError(
            f"no text in {field!r}", f"{where}: {field!r} is a {type(text).__name__}, not text; set --field"
        )
    return Document(text=text, source=_word(row, "source"), licence=_word(row, "licence") or _word(row, "license"))


def _word(row: dict[str, object], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""
