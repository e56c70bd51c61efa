"""Models as people run them: written to a checkpoint once, and loaded in the numbers that a recipe says.

Large ternary models are drawn at once in those numbers: their masters would not fit.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from plait.cli.benches.shapes import config_of
from plait.cli.benches.sides import require_equal
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build, recipe_of
from plait.ops.dispatch import use
from plait.report import Report

# |ours - theirs| / |theirs| of logits: what the order of sums moves in these numbers. int8 and int4 are held against
# bfloat16, where rounding random weights moves much, but far less than the 1.4 of unrelated logits
AGREE = {"fp32": 1e-3, "bf16": 6e-2}
AGREE_ROUNDED = {"int8": 0.15, "int4": 0.9}
# every activation is rounded to int8 from numbers that differ in bfloat16's last bits: a code moves here and there
MOVED = dict.fromkeys(("ternary", "ternary-packed", "ternary-packed-int8"), 0.3)
PROMPT = 12


Source = Path | ModelConfig  # a checkpoint's folder, or the sizes of a model to be drawn


@contextmanager
def checkpoint_of(name: str) -> Iterator[Source]:
    """The folder of a model by name; fresh weights (seed 0) are written in bfloat16 and removed afterwards."""
    if "/" in name:
        yield Path(name)
        return
    if config_of(name).recipe == "ternary":
        yield config_of(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield save(build(config_of(name), seed=0), Path(folder) / "model", format="native", dtype="bfloat16")


def loaded(source: Source, recipe: str) -> Hybrid:
    """The model on the CPU in a recipe's numbers, its weights kept in them too."""
    if isinstance(source, ModelConfig):
        return drawn(source, recipe)
    dtype = "float32" if recipe == "fp32" else "bfloat16"
    return load(source, device="cpu", dtype=dtype, recipe=recipe).eval()


def drawn(config: ModelConfig, recipe: str, seed: int = 0) -> Hybrid:
    """A Transformer of random weights in a recipe's numbers, with no wider ones on the way.

    Raises: ValueError for other layers than attention and MLP, whose parameters have to be begun with care.
    """
    if not set(config.pattern) <= {"*", "-"}:
        raise ValueError(f"pattern {config.pattern!r}: only attention and MLP layers are drawn; load a checkpoint")
    with torch.device("meta"):
        model = Hybrid(config, recipe_of(recipe))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in model.state_dict().items():
        dtype = torch.bfloat16 if like.dtype == torch.float32 and not name.endswith(".scales") else like.dtype
        t = tensors[name] = torch.empty(like.shape, dtype=dtype)
        if name.endswith(".codes"):
            t.view(torch.uint8).random_(0, 256, generator=generator)
            if t.dtype == torch.uint8:  # 0, 1 or 2 in each two bits
                t.copy_((t & 0x55) + (t >> 1 & 0x55))
        elif name.endswith((".scales", "norm.weight")):
            t.fill_(1.0 if name.endswith("weight") else config.init_std * (0.02 if t.dtype == torch.float16 else 1.4))
        else:
            t.normal_(0.0, config.init_std, generator=generator)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


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
    tolerance = (AGREE | MOVED).get(recipe, AGREE["bf16"])
    difference = require_equal(f"{what}: fast path and reference", ours, reference, tolerance)
    report.add(f"{what} logits, difference to the reference", difference, "relative")
    if plain is not None and recipe in AGREE_ROUNDED:
        difference = require_equal(f"{what}: rounded and plain weights", ours[0], plain, AGREE_ROUNDED[recipe])
        report.add(f"{what} logits, difference to bf16", difference, "relative")
    return ours[0]


def plain_logits(source: Source, recipes: Sequence[str]) -> Tensor | None:
    """(V,) logits of the model in bfloat16 if any of the recipes rounds weights, else None."""
    if isinstance(source, ModelConfig) or not any(recipe in AGREE_ROUNDED for recipe in recipes):
        return None
    model = loaded(source, "bf16")
    return last_logits(model, prompt(model.config.vocab_size, PROMPT))[0]
