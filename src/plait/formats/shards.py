"""Writes tensors to safetensors files, one block at a time: memory stays small however large the model is."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from plait.formats.error import CheckpointError
from plait.formats.folder import naming
from plait.formats.safetensors import DTYPES, INDEX, SINGLE
from plait.formats.tensors import LazyTensor

MAX_SHARD_BYTES = 4 << 30
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int], None]  # called with the number of bytes just written


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One file as it was written: its size, and the SHA-256 of its bytes in hexadecimal."""

    n_bytes: int
    sha256: str


def write_tensors(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Written]:
    """Write `model.safetensors`, or numbered shards and their index where it would be larger than a shard may be.

    Args:
        folder: where; the files must not be read by anybody before this returns.
        tensors: by their final names, in the order in which shards are filled.
        max_shard_bytes: a shard holds at least one tensor and otherwise no more than this.
        progress: told of every block.

    Returns: size and checksum of every file, by name.
    """
    plan: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if plan[-1] and used + tensor.n_bytes > max_shard_bytes:
            plan.append({})
            used = 0
        plan[-1][name] = tensor
        used += tensor.n_bytes
    if len(plan) == 1:
        return {SINGLE: _write_file(folder / SINGLE, plan[0], progress)}
    files: dict[str, Written] = {}
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(plan, 1):
        file = f"model-{i:05}-of-{len(plan):05}.safetensors"
        files[file] = _write_file(folder / file, shard, progress)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.n_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files | {INDEX: write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")}


def write_text(path: Path, text: str) -> Written:
    """Write a small file and make sure that it is on the disk."""
    raw = text.encode("utf-8")
    with naming(path), path.open("xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return Written(n_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal; read in small pieces, so that memory stays flat."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], progress: Progress | None) -> Written:
    # widest numbers first keeps every tensor aligned; readers of the format rely on no order
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which safetensors files cannot hold")
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.n_bytes]}
        header[name] = entry
        at += tensor.n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with naming(path), path.open("xb") as file:
        for piece in (len(raw).to_bytes(8, "little"), raw):
            digest.update(piece)
            file.write(piece)
        for _, tensor in ordered:
            for block in tensor.blocks():
                piece = block.cpu().contiguous().view(torch.uint8).numpy().data
                digest.update(piece)
                file.write(piece)
                if progress is not None:
                    progress(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return Written(n_bytes=8 + len(raw) + at, sha256=digest.hexdigest())
