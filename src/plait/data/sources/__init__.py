"""Kinds of files that text comes from; a new kind is one file here and one line in the table."""

from plait.data.document import Read
from plait.data.sources import jsonl, parquet, text

SOURCES: dict[str, Read] = {
    "jsonl": jsonl.read,
    "parquet": parquet.read,
    "text": text.read,
}
