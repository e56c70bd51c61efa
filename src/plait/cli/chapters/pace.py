"""How many steps fit the time: measured on weights that are thrown away, with as many threads as pay."""

import statistics
import time

from plait.cli.chapters.story import Story
from plait.cli.machine import Threads
from plait.data.loader import Batch
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.precision.recipe import PrecisionRecipe
from plait.train.metrics import StepFacts
from plait.train.objective import Objective
from plait.train.optim import Optim, Optimizers
from plait.train.pretrain import NextToken
from plait.train.step import update

# of the time that is left when training begins: both models with their validations; the rest is for chapters after it,
# of which two train on: in fewer bits, and smaller
SHARE = 0.72
VALIDATIONS = 6
MOST_EPOCHS = 8
LEAST_STEPS = 4
# how often to look whether other programs came or went
LOOK_EVERY = 10
TURNS = 3


def calibrate(
    configs: dict[str, ModelConfig],
    objective: Objective[Batch],
    optim: Optim,
    recipe: str | PrecisionRecipe,
    device: str,
) -> dict[str, float]:
    """Seconds of a training step of each model: medians of TURNS, on weights that are thrown away."""
    runs = {}
    for name, config in configs.items():
        model = build(config, recipe, device)
        runs[name] = (model, Optimizers(model, optim))
    times: dict[str, list[float]] = {name: [] for name in configs}
    for draw in range(TURNS + 1):
        batches = objective.batches(draw)
        counted = sum(objective.size(batch).counted for batch in batches)
        for name, (model, optimizers) in runs.items():
            begin = time.perf_counter()
            update(model, objective, batches, counted, optimizers, 1e-3)
            times[name].append(time.perf_counter() - begin)
    # the first step of each allocates
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def steps_within(story: Story, objective: NextToken, seconds: dict[str, float]) -> int:
    """Steps for each model that fit the time, do not repeat the text too often, and do not exceed the scale."""
    step = sum(seconds.values())
    passed = time.monotonic() - story.began
    left = max(story.minutes * 60 - passed, 0.25 * story.minutes * 60)
    # a forward pass is a third of a step
    rows = sum(batch.ids.shape[0] for batch in objective.validation())
    validations = VALIDATIONS * step / 3 * rows / story.scale.batch_size
    fits = int((left * SHARE - validations) / step)
    epochs = MOST_EPOCHS * objective.loader.n_steps_per_epoch()
    return max(LEAST_STEPS, min(fits, epochs, story.scale.max_steps))


class Watch:
    """Sees to the threads while other programs come and go; told of every step."""

    def __init__(self, threads: Threads, expected: float) -> None:
        """Args: threads: to choose from. expected: tokens/s that were measured before."""
        self.threads, self.expected = threads, expected

    def step(self, facts: StepFacts) -> None:
        """Look again after a step that was far too slow, and now and then."""
        if facts.tokens_per_s < self.expected / 3 or facts.step % LOOK_EVERY == 0:
            self.threads.choose()

    def close(self) -> None:
        """Nothing to close."""
