"""Tokens for a sweep from any folder of text, or from Python's standard library, so that it runs on every machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def check(text: str, out: Path, vocab_size: int) -> None:
    """See that tokens made earlier in this folder came from the same text; raises ConfigError."""
    source_of(text)
    made = out / "text.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != _facts(text, vocab_size):
        raise ConfigError(f"out={out} holds tokens of another text or vocabulary; choose another folder with --out")


def prepare(text: str, out: Path, vocab_size: int) -> None:
    """Train a vocabulary and write OUT/tokens, unless that was done before."""
    folder = out / "tokens"
    if (out / "text.json").is_file() and folder.is_dir():
        return
    collected, read, _ = divided(collect(source_of(text), MAX_BYTES, without=out))
    size = vocabulary_for(sum(len(piece.encode()) for piece in read), vocab_size)
    tokenize_documents(
        collected.documents, lambda: train_bpe(read, size), folder, valid=HELD_OUT, jobs=2, replace=folder.is_dir()
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
