"""`plait train`: train a model from a recipe, resume it, and write what came out.

OUT/recipe.json      the settings, defaults and overrides included; `plait train OUT/recipe.json` runs them again
OUT/metrics.jsonl    the facts of every step
OUT/checkpoints/     what a run resumes from, newest last
OUT/final/           the trained model with its tokenizer
OUT/report.jsonl     what was measured
OUT/telemetry.html   what went on inside the model, with run.telemetry_every
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from plait.cli.launch import arg
from plait.cli.objectives import conversations, taught, tokens
from plait.cli.page import inside
from plait.cli.recipe import TrainRecipe
from plait.config import ConfigError, load, to_dict
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint, CheckpointError
from plait.formats.checkpoint import load as load_model
from plait.formats.checkpoint import save as save_model
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build, recipe_of
from plait.precision.device import ready
from plait.report import Report, provenance
from plait.train.checkpoints import Checkpoints, flatten, sweep
from plait.train.lock import alone
from plait.train.loop import DivergedError, Outcome, train
from plait.train.metrics import Observer
from plait.train.objective import Objective
from plait.train.progress import progress

EXAMPLE = """plait tokenize my_texts/ --out tokens --train-vocab 4096
  plait train recipes/pretrain/tiny-hybrid.toml data.sources.text.path=tokens run.steps=500 --out runs/first
  plait train recipes/tune/bitnet-sft.toml data.sources.chat.path=chats.jsonl model.checkpoint=runs/first/final"""

log = logging.getLogger(__name__)

# settings that say how a run is watched and kept, not what it computes; the loop itself compares the learning rates
_FREE = ("run.validate_every", "run.save_", "run.keep", "run.log_every", "run.tensorboard", "run.max_skipped")
_FREE += ("run.spikes.", "run.telemetry_every")  # how a run is guarded and looked into
_JUDGED_LATER = ("run.steps", "run.schedule.", "device", "run.recompute", "data.validation_batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which run, where it goes, and whether it continues."""

    recipe: Path = arg(help="settings of the run, TOML or JSON", positional=True)
    overrides: tuple[str, ...] = arg(default=(), help="settings to change, e.g. run.steps=500", positional=True)
    out: Path | None = arg(default=None, help="folder of the run (default: runs/NAME of the recipe)")
    resume: Literal["auto", "never"] = arg(default="auto", help="continue the newest checkpoint in the folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a recipe names, found and checked. tokenizer: its folder, if there is one."""

    config: ModelConfig
    objective: Objective[Batch]
    tokenizer: Path | None
    device: torch.device


def opened(recipe: TrainRecipe) -> Opened:
    """Find everything that a recipe names; nothing is written.

    Raises: ConfigError, OSError or CheckpointError for what is missing or does not fit.
    """
    if recipe.precision.weight_only:
        raise ConfigError(
            f'precision="{recipe.precision.name}" holds weights as codes, which cannot be trained; train in "bf16", '
            "then plait convert --quantize"
        )
    device = _device(recipe.device)
    read, vocab_size = (conversations if recipe.objective == "sft" else tokens)(recipe)
    config = recipe.model.config(vocab_size)
    needs = recipe_of(config.recipe)
    if needs.is_needed and not needs.weight_only and not recipe.precision.is_needed:
        raise ConfigError(
            f"precision={recipe.precision.name!r}: the model is a {needs.name!r} one, whose weights are another model "
            f'in any other precision; set precision = "{needs.name}"'
            + ("" if recipe.model.checkpoint else ', or model.recipe = "bf16" for one that is not')
        )
    objective = read(config)
    with torch.device("meta"):
        model = Hybrid(config, recipe.precision)
    # a recipe that fits neither model nor device is refused here
    ready(model, recipe.precision, device)
    if recipe.distill is not None:
        objective = taught(recipe, recipe.distill, objective, config, device)
    return Opened(config=config, objective=objective, tokenizer=recipe.tokenizer(), device=device)


def run(inputs: Inputs, observers: Sequence[Observer] | None = None) -> Report:
    """Train; everything that can be refused is refused before anything is written.

    Args:
        inputs: of the command.
        observers: told of every step, in place of the line that shows how it goes.
    """
    recipe = load(TrainRecipe, inputs.recipe, inputs.overrides)
    out = inputs.out or Path("runs") / inputs.recipe.stem
    found = opened(recipe)
    with alone(out):
        sweep(out, "final", _is_whole)
        Checkpoints(out / "checkpoints", recipe.run.keep).sweep()
        _check_out(out, recipe)
        model = _model(recipe, found.config, found.device)
        log.info("%s: %s parameters, %s", out, f"{found.config.cost().params:,}", found.config.pattern)
        try:
            outcome = train(
                model,
                found.objective,
                recipe.run,
                out,
                resume=inputs.resume,
                start={"seed": recipe.seed}
                if recipe.model.checkpoint is None
                else {"checkpoint": str(recipe.model.checkpoint)},
                seed=recipe.seed,
                settings=to_dict(recipe),
                tokenizer=found.tokenizer,
                observers=[progress(recipe.run.steps)] if observers is None else observers,
            )
        except DivergedError:
            # what went on inside says more now than after a good run
            inside.write(out, out.name, provenance(recipe.seed))
            raise
        save_model(model, out / "final", format="native", overwrite=True, tokenizer=found.tokenizer)
        report = _report(out, outcome, recipe)
        if (seen := inside.write(out, out.name, report.provenance)) is not None:
            report.add("telemetry", str(seen))
        report.save_jsonl(out / "report.jsonl")
    return report


def _model(recipe: TrainRecipe, config: ModelConfig, device: torch.device) -> Hybrid:
    if recipe.model.checkpoint is not None:
        return load_model(recipe.model.checkpoint, device=device, dtype="float32", recipe=recipe.precision)
    return build(config, recipe=recipe.precision, device=device, seed=recipe.seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # the first number shows whether this build of torch can use it
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device="{name}" cannot be used here ({error}); use "auto" or "cpu"') from None


def _check_out(out: Path, recipe: TrainRecipe) -> None:
    """Refuse a folder that holds what a run with other settings has made."""
    has_result = (out / "final").exists() or any((out / "checkpoints").glob("step-*"))
    if not has_result or not (out / "recipe.json").is_file():
        # a run that failed before it saved anything holds no place
        return
    before, now = flatten(to_dict(load(TrainRecipe, out / "recipe.json"))), flatten(to_dict(recipe))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name) and not name.startswith((*_FREE, *_JUDGED_LATER)):
            raise ConfigError(
                f"out={out} holds a run of another recipe: {name} was {before.get(name)!r} and is {now.get(name)!r}; "
                "choose another folder with --out, or put the setting back"
            )


def _is_whole(folder: Path) -> bool:
    try:
        Checkpoint.open(folder, verify=True)
    except (CheckpointError, OSError):
        return False
    return True


def _report(out: Path, outcome: Outcome, recipe: TrainRecipe) -> Report:
    report = Report(f"trained {out / 'final'}", provenance=provenance(recipe.seed))
    report.add("steps", outcome.steps)
    report.add("tokens", outcome.tokens)
    report.add("loss of the last step", outcome.loss, "nats/token")
    if outcome.validation_loss is not None:
        report.add("validation loss", outcome.validation_loss, "nats/token")
    report.add("skipped steps", outcome.skipped)
    if outcome.spikes:
        report.add("of them for spikes", outcome.spikes)
    if outcome.rollbacks:
        report.add("times gone back", outcome.rollbacks)
    report.add("seconds", outcome.seconds, "s")
    report.add("speed", outcome.tokens_per_s, "tokens/s")
    report.add("checkpoint", str(outcome.checkpoint))
    return report
