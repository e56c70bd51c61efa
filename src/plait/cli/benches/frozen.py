"""Models as people run them: written to a checkpoint once, and loaded in the numbers that a recipe says."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from plait.cli.benches.shapes import config_of
from plait.cli.benches.sides import require_equal
from plait.formats.checkpoint import load, save
from plait.model.hybrid import Hybrid, build
from plait.ops.dispatch import use
from plait.report import Report

# |ours - theirs| / |theirs| of logits: what the order of sums moves in these numbers. int8 and int4 are held against
# bfloat16, where rounding random weights moves much, but far less than the 1.4 of unrelated logits
AGREE = {"fp32": 1e-3, "bf16": 6e-2}
AGREE_ROUNDED = {"int8": 0.15, "int4": 0.9}
PROMPT = 12


@contextmanager
def checkpoint_of(name: str) -> Iterator[Path]:
    """The folder of a model by name; fresh weights (seed 0) are written in bfloat16 and removed afterwards."""
    if "/" in name:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield save(build(config_of(name), seed=0), Path(folder) / "model", format="native", dtype="bfloat16")


def loaded(folder: Path, recipe: str) -> Hybrid:
    """The model on the CPU in a recipe's numbers, its weights kept in them too."""
    dtype = "float32" if recipe == "fp32" else "bfloat16"
    return load(folder, device="cpu", dtype=dtype, recipe=recipe).eval()


def prompt(vocab_size: int, length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, length) random ids."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def last_logits(model: Hybrid, ids: Tensor) -> Tensor:
    """(B, V) float32 after a prompt whose last two tokens are fed one by one, as decoding does."""
    cache = model.cache(ids.shape[0])
    model(ids[:, :-2], cache=cache, n_logits=1)
    model(ids[:, -2:-1], cache=cache, n_logits=1)
    return model(ids[:, -1:], cache=cache, n_logits=1).logits[:, 0].float()


def check_ours(report: Report, model: Hybrid, recipe: str, plain: Tensor | None, what: str = "") -> Tensor:
    """Hold the fast path against the references of all operations, and rounded weights against plain ones.

    Args:
        plain: logits of the model in bfloat16, for recipes that round weights.
        what: how the report calls it, if not by its recipe.

    Returns: (V,) our logits after `prompt(vocab_size, PROMPT)`.
    Raises: DisagreementError.
    """
    what = what or recipe
    ids = prompt(model.config.vocab_size, PROMPT)
    ours = last_logits(model, ids)
    with use("reference"):
        reference = last_logits(model, ids)
    difference = require_equal(f"{what}: fast path and reference", ours, reference, AGREE.get(recipe, AGREE["bf16"]))
    report.add(f"{what} logits, difference to the reference", difference, "relative")
    if plain is not None and recipe in AGREE_ROUNDED:
        difference = require_equal(f"{what}: rounded and plain weights", ours[0], plain, AGREE_ROUNDED[recipe])
        report.add(f"{what} logits, difference to bf16", difference, "relative")
    return ours[0]


def plain_logits(folder: Path, recipes: Sequence[str]) -> Tensor | None:
    """(V,) logits of the model in bfloat16 if any of the recipes rounds weights, else None."""
    if not any(recipe in AGREE_ROUNDED for recipe in recipes):
        return None
    model = loaded(folder, "bf16")
    return last_logits(model, prompt(model.config.vocab_size, PROMPT))[0]
