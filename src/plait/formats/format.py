"""What every checkpoint format offers, and what a checkpoint holds whatever its format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from plait.formats.shards import Progress
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """config: sizes and recipe. tensors: by our names, not read yet. files: tokenizer and licence, to go along.

    provenance: where it comes from, as JSON-ready data: format, files with sizes (and checksums), parent, licence.
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...] = ()
    provenance: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One row of the table of formats.

    name: how users ask for it. detect: whether a folder is one. read: its contents, tensors lazily.
    plan: (contents) to the tensors by the names that this format gives them; CheckpointError if it cannot express them.
    write: (contents, planned tensors, new folder, largest shard in bytes, progress) fills the folder.
    verify: reads every byte and holds it against recorded checksums, CheckpointError if they differ; None for a
    format that records none.
    """

    name: str
    detect: Callable[[Path], bool]
    read: Callable[[Path], Contents]
    plan: Callable[[Contents], Mapping[str, LazyTensor]]
    write: Callable[[Contents, Mapping[str, LazyTensor], Path, int, Progress | None], None]
    verify: Callable[[Path], None] | None
