"""Write documents, given as ids, to a folder of token shards (see shards.py for what it holds)."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from plait.data.shards import DTYPES, FORMAT, OFFSET, VERSION, documents_file, tokens_file


@dataclass(slots=True)
class _Source:
    documents: int = 0
    tokens: int = 0
    licences: set[str] = field(default_factory=set)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    # a write to a full disk raises an error that names no file
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class ShardWriter:
    """Writes a dataset folder; nothing bears its name before `close`. Also a context manager, which drops on errors."""

    def __init__(
        self,
        folder: str | Path,
        vocab_size: int,
        *,
        eos_id: int | None = None,
        shard_tokens: int = 1 << 28,
        vocabulary_hash: str = "",
    ) -> None:
        """
        Args:
            folder: where the dataset shall be; must not exist.
            vocab_size: ids run below it; up to 65536 a token takes 2 bytes, beyond 4.
            eos_id: put after each document that does not end with it; None puts nothing.
            shard_tokens: start a new shard once one holds so many.
            vocabulary_hash: `Tokenizer.vocabulary_hash`, kept to notice a model with another vocabulary.

        Raises: ValueError for impossible numbers; FileExistsError if the folder exists; OSError if it cannot be made.
        """
        self.folder = Path(folder)
        if vocab_size < 1 or shard_tokens < 1:
            raise ValueError(f"vocab_size = {vocab_size}, shard_tokens = {shard_tokens}: both must be at least 1")
        if eos_id is not None and not 0 <= eos_id < vocab_size:
            raise ValueError(f"eos_id = {eos_id} is outside the vocabulary of {vocab_size}")
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists; remove it or choose another folder")
        self.n_documents = self.n_tokens = 0
        self._vocab_size, self._eos_id, self._shard_tokens = vocab_size, eos_id, shard_tokens
        self._hash = vocabulary_hash
        self._dtype = DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]
        self._sources: dict[str, _Source] = {}
        self._shards: list[dict[str, object]] = []
        self._tokens: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._offsets: list[int] = [0]
        self._aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)

    def add(self, ids: Sequence[int] | np.ndarray, *, source: str = "", licence: str = "") -> None:
        """Append one document.

        Raises: ValueError for a document without tokens or an id outside the vocabulary.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or not tokens.size:
            raise ValueError(f"a document has shape {tokens.shape}; give a flat list of at least one id")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(f"token id {worst} is outside the vocabulary of {self._vocab_size}")
        if self._eos_id is not None and tokens[-1] != self._eos_id:
            tokens = np.append(tokens, self._eos_id)
        path = self._aside / tokens_file(len(self._shards))
        if self._tokens is None:
            self._tokens = path.open("wb")
        data = tokens.astype(self._dtype).tobytes()
        with _naming(path):
            self._tokens.write(data)
        self._sha.update(data)
        self._offsets.append(self._offsets[-1] + tokens.size)
        self.n_documents += 1
        self.n_tokens += tokens.size
        entry = self._sources.setdefault(source, _Source())
        entry.documents += 1
        entry.tokens += tokens.size
        if licence:
            entry.licences.add(licence)
        if self._offsets[-1] >= self._shard_tokens:
            self._end_shard()

    def close(self) -> None:
        """Finish the files and give the folder its name."""
        self._end_shard()
        sources = {
            name: {"documents": entry.documents, "tokens": entry.tokens, "licences": sorted(entry.licences)}
            for name, entry in sorted(self._sources.items())
        }
        record = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "vocabulary_hash": self._hash,
            "eos_id": self._eos_id,
            "documents": self.n_documents,
            "tokens": self.n_tokens,
            "sources": sources,
            "shards": self._shards,
        }
        path = self._aside / "dataset.json"
        with _naming(path):
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        self._aside.rename(self.folder)

    def drop(self) -> None:
        """Remove what was written so far."""
        if self._tokens is not None:
            # where its last bytes do not fit, they are not wanted any more
            with suppress(OSError):
                self._tokens.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            # after a success there is nothing left under this name
            self.drop()

    def _end_shard(self) -> None:
        if self._tokens is None:
            return
        index = len(self._shards)
        with _naming(self._aside / tokens_file(index)):
            self._tokens.close()
        offsets = np.array(self._offsets, dtype=OFFSET).tobytes()
        path = self._aside / documents_file(index)
        with _naming(path):
            path.write_bytes(offsets)
        self._shards.append(
            {
                "documents": len(self._offsets) - 1,
                "tokens": self._offsets[-1],
                "tokens_sha256": self._sha.hexdigest(),
                "documents_sha256": hashlib.sha256(offsets).hexdigest(),
            }
        )
        self._tokens, self._sha, self._offsets = None, hashlib.sha256(), [0]
