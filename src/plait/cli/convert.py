"""`plait convert`: write a checkpoint in another format, dtype or as codes of a few bits, one block at a time.

No model is built in memory.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from plait.cli.launch import arg
from plait.compress.elastic import Sizes
from plait.config import nearest
from plait.formats.checkpoint import Checkpoint
from plait.precision import RECIPES
from plait.report import Report

EXAMPLE = """plait convert downloads/nemotron-h-8b mine --to native
  plait convert runs/demo/model shared/demo-hf --to hf --dtype bfloat16
  plait convert mine mine-int4 --to native --quantize int4
  plait convert elastic/model small --to hf --slice 0.6
  plait convert bitnet-masters bitnet-packed --to hf --quantize ternary-packed"""

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to convert, to what, and where to."""

    source: Path = arg(help="folder of a checkpoint, of any format", positional=True)
    target: Path = arg(help="folder to make", positional=True)
    to: Literal["hf", "native"] = arg(help="format to write")
    dtype: Literal["bfloat16", "float32"] | None = arg(
        default=None, help="store in this; otherwise bit by bit as it is"
    )
    quantize: str | None = arg(
        default=None,
        help="hold weights as codes, for inference: int8 or int4; int4-32-zero names the group and adds zero points; "
        "ternary-packed for a ternary model",
    )
    dequantize: bool = arg(
        default=False, help="packed ternary codes become masters again, which round to the same codes"
    )
    slice: str | None = arg(default=None, help="cut this size out of an elastic model, such as 0.8; see plait compress")
    force: bool = arg(default=False, help="replace a checkpoint that is in the target folder already")
    verify: bool | None = arg(
        default=None,
        help="first hold every byte of the source against its checksums; default: where its format records them",
    )

    def __post_init__(self) -> None:
        coded = [name for name, recipe in RECIPES.items() if recipe.weight_only]
        if self.quantize is not None and self.quantize not in coded:
            near = nearest(self.quantize, coded)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"quantize={self.quantize!r} is unknown{hint} (known: {', '.join(coded)})")
        if self.quantize is not None and self.dequantize:
            raise ValueError(f"quantize={self.quantize!r} with dequantize: give one of them")
        if self.quantize not in (None, "ternary-packed") and self.to == "hf":
            raise ValueError(
                f"quantize={self.quantize!r} with to='hf': no reader of Hugging Face folders knows these codes; "
                "write --to native, which plait reads"
            )


def run(inputs: Inputs) -> Report:
    """Convert; what cannot be expressed is refused before the first byte is written."""
    start = time.perf_counter()
    checkpoint, verify = Checkpoint.open(inputs.source), inputs.verify
    if inputs.slice is not None:
        checkpoint.check(required=verify is True)
        # a slice has other bytes than the folder's checksums speak of
        checkpoint, verify = Sizes.open(inputs.source).slice(checkpoint, inputs.slice), False
    if inputs.quantize is not None:
        checkpoint = checkpoint.quantized(inputs.quantize, inputs.dtype)
    if inputs.dequantize:
        checkpoint = checkpoint.dequantized(inputs.dtype or "bfloat16")
    n_bytes = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
    with _progress(n_bytes) as show:
        checkpoint.save(inputs.target, inputs.to, inputs.dtype, overwrite=inputs.force, progress=show, verify=verify)
    seconds = time.perf_counter() - start
    report = Report(f"{inputs.source} ({checkpoint.provenance['format']}) to {inputs.target} ({inputs.to})")
    files = sorted(inputs.target.glob("*.safetensors"))
    report.add("tensors", len(checkpoint.tensors))
    report.add("parameters", checkpoint.config.cost().params)
    report.add("files of tensors", len(files))
    report.add("bytes", sum(file.stat().st_size for file in files), "bytes")
    if inputs.quantize is not None:
        report.add("bits per parameter", n_bytes * 8 / checkpoint.config.cost().params, "bits")
    report.add("seconds", seconds, "s")
    report.add("speed", n_bytes / seconds / 1e6, "MB/s")
    return report


@contextmanager
def _progress(n_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        yield _lines(n_bytes)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("writing", total=n_bytes)
        yield lambda written: bar.advance(task, written)


def _lines(n_bytes: int) -> Callable[[int], None]:
    due, done = time.monotonic() + _SECONDS_BETWEEN_LINES, 0

    def show(written: int) -> None:
        nonlocal due, done
        done += written
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{done / 1e6:,.0f} of {n_bytes / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    return show
