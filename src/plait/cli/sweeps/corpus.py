"""Tokens for a sweep from any folder of text, or from Python's standard library, so that it runs on every machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.cli.chapters.story import Text
from plait.cli.chapters.text import HELD_OUT, collect, divided, vocabulary_for
from plait.cli.sweeps.table import Trial
from plait.config import ConfigError
from plait.data.prepare import tokenize_documents
from plait.text.bpe import train_bpe
from plait.train.metrics import write_whole

PYTHON = "python"
MAX_BYTES = 64 << 20


def source_of(text: str) -> Path | None:
    """The folder that --text names, None for the standard library; raises ConfigError if there is none."""
    folder = None if text == PYTHON else Path(text)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f'text={text} is no folder; give one of text, or "{PYTHON}" for the standard library')
    return folder


def read(text: str, out: Path, vocab_size: int) -> Text | None:
    """The text, or None if its tokens are in the sweep's folder already; nothing is written.

    Raises: ConfigError if the folder holds tokens of another text; ValueError if there is hardly any text.
    """
    folder, made = source_of(text), out / "text.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != _facts(text, vocab_size):
        raise ConfigError(f"out={out} holds tokens of another text or vocabulary; choose another folder with --out")
    if made.is_file() and (out / "tokens").is_dir():
        return None
    return collect(folder, MAX_BYTES, without=out)


def prepare(found: Text, text: str, out: Path, vocab_size: int) -> None:
    """Train a vocabulary and write OUT/tokens."""
    collected, piece_wise, _ = divided(found)
    size = vocabulary_for(sum(len(piece.encode()) for piece in piece_wise), vocab_size)
    folder = out / "tokens"
    tokenize_documents(
        collected.documents,
        lambda: train_bpe(piece_wise, size),
        folder,
        valid=HELD_OUT,
        jobs=2,
        replace=folder.is_dir(),
    )
    write_whole(out / "text.json", json.dumps(_facts(text, vocab_size)) + "\n")


def on_tokens(trial: Trial, out: Path) -> Trial:
    """The run with these tokens as its only source."""
    data: dict[str, Any] = {
        **trial.settings.get("data", {}),
        "sources": {"text": {"path": (out / "tokens").as_posix()}},
    }
    for name in ("phases", "max_epochs"):
        data.pop(name, None)
    return replace(trial, settings={**trial.settings, "data": data})


def _facts(text: str, vocab_size: int) -> dict[str, object]:
    return {"text": text, "vocab_size": vocab_size, "max_bytes": MAX_BYTES}
