"""Reads safetensors files by memory mapping, after checking every number of their header.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), and the bytes. Nothing is trusted:
a range that overlaps, leaves the file or does not fit its shape is refused by name. Pages are given back after each
copy, so that loading a model needs the memory of the model and little more.

Source   https://huggingface.co/docs/safetensors (the format's description).
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from plait.formats.error import CheckpointError
from plait.formats.tensors import LazyTensor, Run

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# the reference reader's own limit; a header of a model with a million tensors is smaller
_MAX_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class Mapped:
    """A source in a file: numbers of one dtype from byte `offset` on."""

    map: mmap.mmap
    offset: int
    dtype: torch.dtype

    def read(self, start: int, count: int) -> Tensor:
        if not count:
            return torch.empty(0, dtype=self.dtype)
        begin, size = self.offset + start * self.dtype.itemsize, self.dtype.itemsize
        if begin % size:
            # a file need not align its tensors, a processor may ask for it
            raw = torch.frombuffer(self.map, dtype=torch.uint8, count=count * size, offset=begin)
            return raw.clone().view(self.dtype)
        return torch.frombuffer(self.map, dtype=self.dtype, count=count, offset=begin)

    def drop(self, start: int, count: int) -> None:
        # whole pages only, and one more where the last block ended inside it
        begin = self.offset + start * self.dtype.itemsize
        end = begin + count * self.dtype.itemsize
        begin -= begin % mmap.PAGESIZE
        if hasattr(self.map, "madvise") and end > begin:
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, by name; nothing but the header is read.

    Raises: CheckpointError naming the file and the tensor for anything that does not add up.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        n_header = int.from_bytes(head, "little")
        if len(head) < 8 or n_header > size - 8 or n_header > _MAX_HEADER:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header should have {n_header:,} bytes, "
                f"the file has {size:,}; fetch it again"
            )
        header = _header(file.read(n_header), path)
        # a private mapping: torch asks for a writable buffer, the file stays as it is
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry, path)
        if end > size - 8 - n_header:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends {end - (size - 8 - n_header):,} bytes beyond the end of the file; "
                "it is truncated, fetch it again"
            )
        source = Mapped(mapped, 8 + n_header + begin, dtype)
        tensors[name] = LazyTensor(shape=shape, dtype=dtype, runs=(Run(source, 0, prod(shape)),))
        ranges.append((begin, end, name))
    _check_ranges(sorted(ranges), size - 8 - n_header, path)
    return tensors


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint folder, in one file or in shards with an index.

    Raises: CheckpointError naming the file that is missing or broken, or the name that two shards hold.
    """
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_nothing_in(folder))
    weight_map = _weight_map(folder / INDEX)
    tensors: dict[str, LazyTensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing, {INDEX} names it; the download is incomplete")
        for name, tensor in open_file(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder / file}: tensor {name!r} is also in another shard; fetch the folder again"
                )
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX} names {len(absent)} tensors that its shards lack, first {absent[0]!r}; "
            "the shards belong to another index, fetch the folder again"
        )
    return tensors


def files_of(folder: Path) -> list[str]:
    """Names of the files that hold the tensors of a folder."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return list(dict.fromkeys(_weight_map(folder / INDEX).values())) if (folder / INDEX).is_file() else []


def _nothing_in(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read; "
            "save them as safetensors with the program that made them"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; the download is incomplete or this is no checkpoint"


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not readable ({error}); fetch it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is no table of tensor names to files; fetch it again")
    for name, file in weight_map.items():
        # links inside the folder are fine (download caches are made of them), paths out of it are not
        if not isinstance(file, str) or not file or "/" in file or "\\" in file or file in (".", ".."):
            raise CheckpointError(f"{path}: tensor {name!r} lies in {file!r}; only plain file names are read")
    return weight_map


def _header(raw: bytes, path: Path) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        data = dict(pairs)
        if len(data) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: {twice!r} is in the header twice; the file is broken, fetch it again")
        return data

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not readable ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header is a {type(header).__name__}, expected a table; fetch the file again"
        )
    return header


def _entry(name: str, entry: object, path: Path) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape and byte range of one tensor, checked against each other."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; fetch the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape} at {offsets}; fetch the file again")
    n_bytes = prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != n_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs {n_bytes:,} bytes, "
            f"its range {offsets} does not hold them; the file is broken, fetch it again"
        )
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _check_ranges(ranges: list[tuple[int, int, str]], n_data: int, path: Path) -> None:
    """Tensors must lie one after the other and fill the file, as the format demands."""
    at = 0
    for begin, end, name in ranges:
        if begin != at:
            what = "overlaps the one before it" if begin < at else f"lies {begin - at:,} bytes behind the one before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what}; the file is broken, fetch it again")
        at = end
    if at != n_data:
        raise CheckpointError(f"{path} has {n_data - at:,} bytes that no tensor claims; it is broken, fetch it again")
