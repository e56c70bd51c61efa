"""Finds what each layer is worth by leaving it out: removes the least important one, and so on."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScores:
    order: tuple[int, ...]
    importance: Mapping[str, tuple[float, ...]]
