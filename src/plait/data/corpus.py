"""Find the text files behind a list of paths, and read them in a fixed order."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plait.data.document import Document, Skipped, SourceError
from plait.data.sources import SOURCES
from plait.data.sources.compressed import PACKED

_KIND = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# folders that hold no text of the user, whatever is in them
_UNREAD = {"__pycache__", "node_modules", "site-packages"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A file to read: by which source, whether it was named or met in a tree, and what to call texts from it."""

    path: Path
    kind: str
    named: bool
    label: str


def find_files(paths: Sequence[Path]) -> list[Found]:
    """List the files that the paths name, and all regular files of the folders among them, sorted folder by folder.

    In folders, names that start with a dot and caches are left out; links to folders are not followed.

    Raises: FileNotFoundError naming the path that does not exist; ValueError for one that is no file or folder.
    """
    found: list[Found] = []
    for path in paths:
        if path.is_file():
            found.append(Found(path=path, kind=kind_of(path), named=True, label=_stem(path)))
        elif path.is_dir():
            label = path.resolve().name
            found += [Found(path=file, kind=kind_of(file), named=False, label=label) for file in _tree(path)]
        elif path.exists():
            raise ValueError(f"{path} is neither a file nor a folder; name text, JSONL or Parquet files")
        else:
            raise FileNotFoundError(f"{path} does not exist; name files or folders of text")
    return found


def kind_of(path: Path) -> str:
    """The source (a name in SOURCES) that reads this file, by the end of its name; what is unknown is taken as text."""
    bare = path.with_suffix("") if path.suffix in PACKED else path
    return _KIND.get(bare.suffix.lower(), "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents of many files; iterate as often as you like, the order is always the same.

    A file met in a tree that cannot be read is left out and counted; one that was named raises SourceError.
    """

    files: Sequence[Found]
    field: str = "text"

    @classmethod
    def of(cls, paths: Sequence[Path], field: str = "text") -> "Corpus":
        """The corpus behind paths; raises ValueError if there is no file at all, or as `find_files`."""
        files = find_files(paths)
        if not files:
            raise ValueError(f"no files under {', '.join(map(str, paths)) or 'nothing'}; name files or folders of text")
        return cls(files=files, field=field)

    def __iter__(self) -> Iterator[Document]:
        return self.read(Counter())

    def read(self, skipped: Skipped) -> Iterator[Document]:
        """Yield the documents, counting in `skipped` what is left out and why."""
        for file in self.files:
            try:
                for document in SOURCES[file.kind](file.path, self.field, skipped):
                    if document.text.strip():
                        yield document if document.source else replace(document, source=file.label)
                    else:
                        skipped["empty"] += 1
            except SourceError as error:
                if file.named:
                    raise
                skipped[error.reason] += 1
            except PermissionError:
                if file.named:
                    raise
                skipped["not permitted"] += 1

    def size_bytes(self) -> int:
        """Bytes of the files as they lie on the disk (packed ones count packed)."""
        return sum(file.path.stat().st_size for file in self.files)


def _stem(path: Path) -> str:
    while path.suffix in (*PACKED, *_KIND):
        path = path.with_suffix("")
    return path.stem or path.name


def _tree(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _UNREAD)
        # is_file asks for a regular file: reading a pipe or a device could wait for ever
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())
