"""Checkpoints in and out: one file per format, listed here in the order in which they are detected."""

from plait.formats import hf, native

FORMATS = {row.name: row for row in (native.FORMAT, hf.FORMAT)}
