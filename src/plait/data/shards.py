"""Token shards: documents as numbers in a few large files, read without loading them.

    tokens-00000.bin      all tokens of the shard one after another, little endian, uint16 or uint32
    documents-00000.bin   where each document starts, and at last where the shard ends: int64, little endian
    dataset.json          counts, data type, vocabulary, sources with licences, a SHA-256 per file

A document lies in one shard and ends with the end-of-text token. The folder is written aside under another name and
renamed when it is complete, so a folder with this name is a whole dataset.
"""

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = "plait-tokens"
VERSION = 1
OFFSET = np.dtype("<i8")
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint16", "uint32")}


def tokens_file(shard: int) -> str:
    """Name of the file with the tokens of a shard."""
    return f"tokens-{shard:05d}.bin"


def documents_file(shard: int) -> str:
    """Name of the file with the document offsets of a shard."""
    return f"documents-{shard:05d}.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    tokens: np.ndarray
    offsets: np.ndarray


class Dataset:
    """A folder of token shards, mapped into memory: opening reads only the document offsets."""

    def __init__(self, folder: Path, record: dict[str, object], shards: list[_Shard]) -> None:
        """Use `Dataset.open`."""
        self.folder = folder
        self.record = record
        """What dataset.json says: vocab_size, vocabulary_hash, eos_id, sources with counts and licences, and so on."""
        self._shards = shards
        self._first = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)]).tolist()
        self.n_documents: int = self._first[-1]
        self.n_tokens: int = sum(len(shard.tokens) for shard in shards)

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Open a dataset and check that its files are whole (sizes and offsets; `verify` also reads all tokens).

        Raises: FileNotFoundError if there is none; ValueError naming the file that is truncated, foreign or damaged.
        """
        folder = Path(folder)
        record = _record(folder)
        dtype = DTYPES[str(record["dtype"])]
        shards = [_open_shard(folder, i, entry, dtype) for i, entry in enumerate(_entries(folder, record))]
        dataset = cls(folder, record, shards)
        for name, count in (("documents", dataset.n_documents), ("tokens", dataset.n_tokens)):
            if record.get(name) != count:
                raise ValueError(
                    f"{folder}: dataset.json says {record.get(name)} {name}, the shards hold {count}; {_FIX}"
                )
        return dataset

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n_documents,) int64: tokens of each document, its end-of-text token included."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.offsets) for shard in self._shards)])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document: a view on the file, uint16 or uint32.

        Raises: IndexError unless 0 <= index < n_documents.
        """
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents} in {self.folder}")
        place = bisect_right(self._first, index) - 1
        shard, index = self._shards[place], index - self._first[place]
        return shard.tokens[shard.offsets[index] : shard.offsets[index + 1]]

    def verify(self) -> None:
        """Read every file and compare its checksum; raises ValueError naming the first that differs."""
        for i, entry in enumerate(_entries(self.folder, self.record)):
            for file, key in ((tokens_file(i), "tokens_sha256"), (documents_file(i), "documents_sha256")):
                with (self.folder / file).open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != entry.get(key):
                    raise ValueError(f"{self.folder / file} has changed since it was written (checksum); {_FIX}")


_FIX = "copy the folder again, or write it anew with plait tokenize"


def _record(folder: Path) -> dict[str, object]:
    file = folder / "dataset.json"
    if not file.is_file():
        inner = [name for name in ("train", "valid") if (folder / name / "dataset.json").is_file()]
        hint = f"did you mean {folder / inner[0]}?" if inner else "write one with plait tokenize"
        raise FileNotFoundError(f"{folder} holds no dataset (no dataset.json); {hint}")
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}); {_FIX}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe token shards (format is not {FORMAT!r}); {_FIX}")
    if record.get("version") != VERSION:
        raise ValueError(f"{file} has version {record.get('version')!r}, this Plait reads {VERSION}; {_FIX}")
    if record.get("dtype") not in DTYPES:
        raise ValueError(f"{file}: dtype = {record.get('dtype')!r} is none of {', '.join(DTYPES)}; {_FIX}")
    return record


def _entries(folder: Path, record: dict[str, object]) -> list[dict[str, object]]:
    entries = record.get("shards")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{folder / 'dataset.json'}: shards is no list of objects; {_FIX}")
    return entries


def _open_shard(folder: Path, index: int, entry: dict[str, object], dtype: np.dtype) -> _Shard:
    n_documents, n_tokens = entry.get("documents"), entry.get("tokens")
    if not isinstance(n_documents, int) or not isinstance(n_tokens, int) or n_documents < 1 or n_tokens < n_documents:
        raise ValueError(
            f"{folder / 'dataset.json'}: shard {index} has {n_documents!r} documents, {n_tokens!r} tokens; {_FIX}"
        )
    tokens = _map(folder / tokens_file(index), dtype, n_tokens)
    offsets = _map(folder / documents_file(index), OFFSET, n_documents + 1)
    if offsets[0] != 0 or offsets[-1] != n_tokens or (np.diff(offsets) < 1).any():
        raise ValueError(f"{folder / documents_file(index)} does not divide {n_tokens} tokens into documents; {_FIX}")
    return _Shard(tokens=tokens, offsets=offsets)


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not file.is_file():
        raise ValueError(f"{file} is missing; {_FIX}")
    size, wanted = file.stat().st_size, count * dtype.itemsize
    if size != wanted:
        raise ValueError(f"{file} is truncated or foreign: {size} bytes, expected {wanted}; {_FIX}")
    # a plain view: slicing the mapped class itself costs several times as much
    return np.asarray(np.memmap(file, dtype=dtype, mode="r"))
