"""Parquet tables: one row per document, the text in one column."""

from collections.abc import Iterator
from pathlib import Path

from plait.data.document import Document, Skipped, SourceError

_ROWS = 256
_LICENCE = ("licence", "license")


def read(path: Path, field: str, skipped: Skipped) -> Iterator[Document]:
    """Yield the text of each row; the columns `source` and `licence` (or `license`) are taken along.

    Args:
        path: the file.
        field: name of the column with the text.
        skipped: counts rows without text.

    Raises: SourceError if the file is no Parquet, or has no such column of text (the columns are named).
    """
    # a large library that plain text does not need
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow
            if field not in columns.names:
                known = ", ".join(columns.names)
                raise SourceError(f"no field {field!r}", f"{path} has no column {field!r}, only {known}; set --field")
            kind = columns.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise SourceError(
                    f"no text in {field!r}", f"{path}: column {field!r} holds {kind}, not text; set --field"
                )
            wanted = [name for name in dict.fromkeys((field, "source", *_LICENCE)) if name in columns.names]
            for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    if row[field] is None:
                        skipped["empty"] += 1
                        continue
                    licence = next((row[name] for name in _LICENCE if row.get(name)), "")
                    yield Document(text=row[field], source=str(row.get("source") or ""), licence=str(licence))
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError("corrupt", f"{path} is no readable Parquet file ({error}); copy it again") from error
