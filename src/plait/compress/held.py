"""Tensors with a few facts in one file, which appears whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write a file beside its place and rename it. facts: JSON-ready."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, aside, metadata={"facts": json.dumps(facts)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote.

    Raises: ValueError naming the file if it is none of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); remove it, it is made again") from None
