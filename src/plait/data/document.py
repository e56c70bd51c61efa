"""One piece of text that is read as a whole, and the account of what was not read."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, where it is from, and under which licence it may be used ("" where the file does not say)."""

    text: str
    source: str = ""
    licence: str = ""


class SourceError(ValueError):
    """A file that cannot be read as what it claims to be; `reason` is a word or two to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Skipped = Counter[str]
"""Reason -> how many files or records were left out for it."""

Read = Callable[[Path, str, Skipped], Iterator[Document]]
"""A source: (file, name of the field or column that holds the text, where to count what is left out) -> documents.

It raises SourceError if the file as a whole is unreadable.
"""
