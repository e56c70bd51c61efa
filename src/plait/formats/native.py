"""Plait's own folders: `plait.json` beside safetensors in our names, with a checksum of every file.

They hold any model, layers of different sizes too, and say where it comes from.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from plait.formats.error import CheckpointError
from plait.formats.folder import carried, copy_file
from plait.formats.format import Contents, Format
from plait.formats.rules import same_names
from plait.formats.safetensors import open_folder
from plait.formats.shards import Progress, Written, sha256_of, write_tensors, write_text
from plait.formats.tensors import LazyTensor
from plait.model.config import ModelConfig

MANIFEST = "plait.json"
VERSION = 1


def _detect(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> tuple[ModelConfig, dict[str, Written], dict[str, object]]:
    """What plait.json says: config, files, provenance.

    Raises: CheckpointError if it is broken or was written by a newer Plait.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        version = data["version"]
        if version != VERSION:
            raise CheckpointError(f"{path} has version {version!r}, this Plait reads {VERSION}; update Plait")
        config = dict(data["config"])
        files = {name: Written(n_bytes=f["bytes"], sha256=f["sha256"]) for name, f in data["files"].items()}
        provenance = dict(data["provenance"])
    except CheckpointError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not readable ({type(error).__name__}: {error}); fetch it again") from error
    for name in files:
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names {name!r}; only plain file names are read")
    try:
        return ModelConfig.from_dict(config, "config"), files, provenance
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read(folder: Path) -> Contents:
    config, files, provenance = read_manifest(folder)
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the copy is incomplete")
        if path.stat().st_size != written.n_bytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, it was written with {written.n_bytes:,}; copy it again"
            )
    return Contents(
        config=config,
        tensors=same_names(config, open_folder(folder), str(folder)),
        files=carried(folder),
        provenance={
            **provenance,
            "format": "native",
            "files": {name: {"bytes": file.n_bytes, "sha256": file.sha256} for name, file in files.items()},
        },
    )


def _plan(contents: Contents) -> Mapping[str, LazyTensor]:
    return contents.tensors


def _write(
    contents: Contents, tensors: Mapping[str, LazyTensor], folder: Path, max_shard: int, progress: Progress | None
) -> None:
    files = write_tensors(folder, tensors, max_shard_bytes=max_shard, progress=progress)
    for file in contents.files:
        copy_file(file, folder)
        files[file.name] = Written(n_bytes=(folder / file.name).stat().st_size, sha256=sha256_of(folder / file.name))
    manifest = {
        "version": VERSION,
        "config": contents.config.to_dict(),
        "provenance": {"torch": str(torch.__version__), **contents.provenance},
        "files": {name: {"bytes": file.n_bytes, "sha256": file.sha256} for name, file in files.items()},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _verify(folder: Path) -> None:
    _, files, _ = read_manifest(folder)
    for name, written in files.items():
        if sha256_of(folder / name) != written.sha256:
            raise CheckpointError(
                f"{folder / name} was changed or damaged after it was written: "
                f"its SHA-256 is not the one in {MANIFEST}; "
                "copy it again, or read it as it is with verify=False (plait convert --no-verify)"
            )


FORMAT = Format(name="native", detect=_detect, read=_read, plan=_plan, write=_write, verify=_verify)
