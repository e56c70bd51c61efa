"""Draws what a verb has to say in the terminal: layer patterns, numbers that people read, and reports with colours."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from plait.model.layer import LayerSpec
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.report import Report

# one colour per kind; the terminal's own palette, so that they suit dark and light ones
COLOURS = {"M": "cyan", "*": "yellow", "-": "bright_black", "E": "magenta"}


@dataclass(slots=True)
class Drawn(Report):
    """A report that shows itself as a drawing instead of a plain table of facts."""

    drawing: str = ""

    def table(self) -> str:
        """Return the drawing."""
        return self.drawing


def render(*parts: RenderableType, width: int | None = None) -> str:
    """Turn rich parts into text, with colours only if standard output is a terminal that wants them.

    Args:
        parts: drawn one below the other.
        width: columns; None asks the terminal (100 where there is none).
    """
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    if width is None:
        width = Console().width if on_terminal else 100
    page = io.StringIO()
    # NO_COLOR is rich's business
    Console(file=page, force_terminal=on_terminal, width=width, highlight=False).print(Group(*parts))
    # rich fills lines with blanks, which are only noise in a file
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def pattern(letters: str, *, row: int = 0, per_row: int = 0) -> Text:
    """Draw a pattern of layers as coloured letters under a ruler of layer indices.

    Args:
        letters: one per layer.
        row: unused columns left of it.
        per_row: letters in a line, 0 for 60.
    """
    per_row = per_row or 60
    text = Text()
    for begin in range(0, len(letters), per_row):
        part = letters[begin : begin + per_row]
        ruler = "".join(f"{begin + i:<10}" for i in range(0, len(part), 10))
        text.append(" " * row + ruler.rstrip() + "\n", "dim")
        text.append(" " * row)
        for letter in part:
            text.append(letter, f"bold {COLOURS[letter]}")
        text.append("\n")
    text.rstrip()
    return text


def count(n: float) -> str:
    """A number of things in four digits: 8.101 B, 45.02 M, 12,345."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(n) >= scale * 0.99995:
            return f"{_digits(n / scale)} {unit}"
    return f"{n:,.0f}" if abs(n) >= 100 or n == int(n) else f"{n:.3g}"


def flops(n: float) -> str:
    """Floating-point operations in decimal units: 15.28 GFLOP."""
    return f"{count(n).replace(' M', ' MFLOP').replace(' B', ' GFLOP').replace(' T', ' TFLOP')}"


def size(n_bytes: float) -> str:
    """Bytes in binary units: 84 MiB, 15.09 GiB."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n_bytes) >= scale:
            value = n_bytes / scale
            return f"{value:.0f} {unit}" if value == int(value) else f"{_digits(value)} {unit}"
    return f"{n_bytes:.0f} bytes"


def _digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))) + 1)}f}"


def positions(layers: Sequence[LayerSpec], wanted: Callable[[LayerSpec], bool]) -> str:
    """Where some layers are: their indices if they are few, else how many."""
    where = [i for i, spec in enumerate(layers) if wanted(spec)]
    if len(where) <= 10:
        return "layer " * (len(where) == 1) + "layers " * (len(where) > 1) + ", ".join(map(str, where))
    return f"{len(where)} layers"


def sizes_of(spec: LayerSpec) -> str:
    """What a layer is made of, in words."""
    match spec:
        case Mamba2():
            return f"{spec.n_heads} heads of {spec.head_dim}, state {spec.d_state}, {spec.n_groups} groups"
        case Attention():
            order = "no positions" if spec.rope is None else f"RoPE {spec.rope.base:,.0f}"
            return f"{spec.n_heads}/{spec.n_kv_heads} heads of {spec.head_dim}, {order}"
        case MLP():
            shape = "gated " if spec.gated else ""
            return f"{spec.d_ff:,} hidden, {shape}{'squared ReLU' if spec.activation == 'relu2' else 'SiLU'}"
        case MoE():
            shared = f", shared {spec.d_shared:,}" if spec.d_shared else ""
            return f"{spec.n_chosen} of {spec.n_experts} experts of {spec.d_ff:,}{shared}"
    return ""
