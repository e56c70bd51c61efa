"""How long a sweep will take, before it begins: FLOPs that follow from the sizes, and a few steps timed on the clock.

    hours = sum over runs of  steps x seconds of a step of its method

Each method is timed with its own precision on weights that are thrown away and tokens drawn at random: how long a step
takes depends on how many there are, not on what they say. Validation is a forward pass, a third of a step per batch.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from plait.cli.sweeps.table import Sweep, Trial
from plait.cli.train import Opened
from plait.data.loader import Batch
from plait.model.hybrid import build
from plait.report import Report
from plait.train.metrics import step_flops
from plait.train.optim import Optimizers
from plait.train.step import update

TIMED = 2


def estimate(sweep: Sweep, opened: dict[str, tuple[Trial, Opened]], trials: Sequence[Trial], jobs: int) -> Report:
    """Runs, tokens, FLOPs and hours of a sweep.

    Args:
        sweep: what was asked.
        opened: by method, its first run and what that names.
        trials: all runs.
        jobs: runs at a time; they are taken to share the machine evenly, so that nothing is gained or lost.
    """
    report = Report(f"plait sweep: {len(trials)} runs")
    report.add("runs", len(trials))
    report.add("methods", len(opened))
    report.add("runs at a time", jobs)
    hours = flops = 0.0
    tokens_of_all = 0
    for name, (trial, found) in opened.items():
        recipe, batch = trial.recipe(), _tokens(trial, found)
        seconds = step_seconds(trial, found, batch)
        data, steps = recipe.data, recipe.run.steps
        tokens = data.batch_size * data.seq_len
        # a row of one document: token t sees t + 1 keys
        flops_of_run = steps * step_flops(found.config, tokens, tokens * (data.seq_len + 1) // 2)
        validations = 1 + ((steps - 1) // recipe.run.validate_every if recipe.run.validate_every else 0)
        held_out = len(found.objective.validation()) / data.accumulate
        seconds_of_run = steps * seconds + validations * held_out * seconds / 3
        runs = sum(other.method == name for other in trials)
        report.add(f"{name} parameters", found.config.cost().params)
        report.add(f"{name} step", seconds, "s", TIMED)
        report.add(f"{name} speed", flops_of_run / steps / seconds / 1e9, "GFLOP/s")
        report.add(f"{name} hours of {runs} runs", runs * seconds_of_run / 3600, "h")
        hours, flops = hours + runs * seconds_of_run / 3600, flops + runs * flops_of_run
        tokens_of_all += runs * steps * tokens
    report.add("tokens of all runs", tokens_of_all)
    report.add("FLOPs of all runs", flops, "FLOP")
    report.add("hours of all runs", hours, "h")
    if sweep.find == "largest stable":
        # each probe is a rate for every seed of a method
        per_rate = len({trial.lr for trial in trials})
        report.add("hours of looking for rates, at most", hours / per_rate * sweep.stable.probes, "h")
    return report


def step_seconds(trial: Trial, found: Opened, batch: Batch) -> float:
    """Seconds of a training step, the median of TIMED after one that is not counted."""
    recipe = trial.recipe()
    model = build(found.config, recipe.precision, found.device)
    optimizers = Optimizers(model, recipe.run.optim)
    parts = batch.split(recipe.data.accumulate)
    counted = batch.ids.numel()
    times = []
    for _ in range(TIMED + 1):
        begin = time.perf_counter()
        update(model, found.objective, parts, counted, optimizers, recipe.run.schedule.peak)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _tokens(trial: Trial, found: Opened) -> Batch:
    data = trial.recipe().data
    shape = data.batch_size, data.seq_len
    draw = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(found.config.vocab_size, shape, generator=draw) for _ in range(2))
    starts = torch.zeros(shape, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(ids=ids, targets=targets, starts=starts)
