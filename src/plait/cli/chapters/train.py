"""Second chapter: train the hybrid and its Transformer twin on the same tokens in the same order.

The number of steps is chosen from the measured speed of both, so that a slower machine trains for as long on fewer
tokens; both always make the same steps.
"""

import math
import statistics
import time

import torch

from plait.cli.chapters import twins
from plait.cli.chapters.story import HYBRID, TWIN, Story
from plait.cli.drawing import count
from plait.cli.machine import speed
from plait.cli.page.blocks import Block, Chart, Prose, Section
from plait.cli.page.chart import Axis, Series, line_chart
from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.tokenizer import Tokenizer
from plait.train.loop import Outcome, TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.optim import Optim, Optimizers
from plait.train.pretrain import NextToken
from plait.train.progress import progress
from plait.train.schedule import Schedule
from plait.train.step import update

# of the whole time: training with its validations; the rest is text, measurements and export
SHARE = 0.7
VALIDATION_TOKENS = 32768
VALIDATIONS = 6
MOST_EPOCHS = 8
LEAST_STEPS = 4
OPTIM = Optim(kind="adamw", weight_decay=0.1)
PEAK_LR = 4e-3


def tell(story: Story) -> Section:
    """Train both models; leaves them in story.models and their curves in story.curves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = "bf16" if speed(device).has_fast_bf16 else "fp32"
    tokenizer = Tokenizer.open(story.tokenizer)
    first = twins.hybrid(story.scale, tokenizer.vocab_size, tokenizer.eos_ids[0])
    configs = {HYBRID: first, TWIN: twins.twin(first)}
    objective = _objective(story)
    seconds = calibrate(configs, objective, recipe, device)
    steps = steps_within(story, objective, seconds)
    story.say(
        f"{count(first.cost().params)} parameters each, {recipe}, {steps} steps of "
        f"{objective.loader.tokens_per_step} tokens: {steps * sum(seconds.values()):.0f} s for both"
    )
    outcomes = {name: _train(story, name, config, objective, recipe, device, steps) for name, config in configs.items()}
    return Section(name="train", title="Training both", blocks=_report(story, configs, outcomes, recipe, objective))


def calibrate(
    configs: dict[str, ModelConfig], objective: NextToken, recipe: str, device: str, n: int = 3
) -> dict[str, float]:
    """Seconds of a training step of each model: medians of n, taken in turns, on weights that are thrown away."""
    runs = {}
    for name, config in configs.items():
        model = build(config, recipe, device)
        runs[name] = (model, Optimizers(model, OPTIM))
    times: dict[str, list[float]] = {name: [] for name in configs}
    for draw in range(n + 1):
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


def _objective(story: Story) -> NextToken:
    scale = story.scale
    loader = Loader(
        {"text": Dataset.open(story.train_data)},
        batch_size=scale.batch_size,
        seq_len=scale.seq_len,
        seed=story.seed,
    )
    valid = Loader(
        {"text": Dataset.open(story.valid_data)},
        batch_size=scale.batch_size,
        seq_len=scale.seq_len,
        seed=story.seed,
        repeat=False,
    )
    n = max(1, min(VALIDATION_TOKENS, 64 * loader.tokens_per_step) // valid.tokens_per_step)
    return NextToken(loader, validation=valid, validation_batches=n, identity={"seed": story.seed})


def _train(
    story: Story, name: str, config: ModelConfig, objective: NextToken, recipe: str, device: str, steps: int
) -> Outcome:
    model = build(config, recipe, device, seed=story.seed)
    curve = story.curves[name] = {"training": [], "validation": []}

    def note(facts: StepFacts) -> None:
        if facts.applied:
            curve["training"].append((float(facts.tokens), facts.loss))
        if facts.validation_loss is not None:
            curve["validation"].append((float(facts.tokens), facts.validation_loss))

    story.say(f"{name} {config.pattern}")
    settings = TrainConfig(
        steps=steps,
        optim=OPTIM,
        # short runs gain most from a long decay
        schedule=Schedule(peak=PEAK_LR, warmup_steps=max(1, steps // 20), decay_steps=steps // 2, decay="linear"),
        validate_every=max(1, steps // VALIDATIONS),
        save_minutes=0,
        keep=1,
    )
    outcome = train(
        model,
        objective,
        settings,
        story.out / name.lower(),
        resume="never",
        start={"seed": story.seed},
        tokenizer=story.tokenizer,
        on_step=note,
        observers=[progress(steps)],
    )
    model.origin = story.tokenizer
    story.models[name] = model.eval()
    return outcome


def bits_per_byte(loss: float, story: Story) -> float:
    """A validation loss in a unit that does not depend on the vocabulary."""
    data, tokenizer = Dataset.open(story.valid_data), Tokenizer.open(story.tokenizer)
    n_bytes = sum(len(tokenizer.decode(data.document(i).tolist()).encode()) for i in range(data.n_documents))
    tokens = data.n_tokens - data.n_documents
    return loss * tokens / max(n_bytes, 1) / math.log(2)


def _report(
    story: Story, configs: dict[str, ModelConfig], outcomes: dict[str, Outcome], recipe: str, objective: NextToken
) -> tuple[Block, ...]:
    params = {name: config.cost().params for name, config in configs.items()}
    story.compare("parameters", {name: count(n) for name, n in params.items()}, params, "")
    steps, tokens = outcomes[HYBRID].steps, outcomes[HYBRID].tokens
    story.report.add("training steps", steps)
    story.report.add("training tokens", tokens, "tokens")
    story.report.add("training precision", recipe)
    losses = {name: outcome.validation_loss for name, outcome in outcomes.items()}
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    bits = {name: bits_per_byte(loss, story) for name, loss in losses.items()}
    story.compare("validation loss", {n: f"{loss:.3f} nats/token" for n, loss in losses.items()}, losses, "nats/token")
    story.compare(
        "validation loss per byte", {n: f"{loss:.3f} bits/byte" for n, loss in bits.items()}, bits, "bits/byte"
    )
    rates = {name: outcome.tokens_per_s for name, outcome in outcomes.items()}
    story.compare("training speed", {n: f"{rate:,.0f} tokens/s" for n, rate in rates.items()}, rates, "tokens/s", steps)
    epochs = steps / objective.loader.n_steps_per_epoch()
    scale = story.scale
    words = (
        f"Both are trained from scratch on the same {tokens:,} tokens in the same order: {steps:,} steps of "
        f"{scale.batch_size} x {scale.seq_len}, {epochs:.2f} times through the text, with AdamW and the same schedule "
        f"(warm-up, stable, linear decay), in {recipe.upper()} over FP32 master weights. The number of steps was "
        f"chosen so that the demo fits into {story.minutes:g} minutes on this machine."
    )
    n_valid = len(objective.validation()) * objective.loader.tokens_per_step
    note = f"{recipe.upper()}; validation on {n_valid:,} held-out tokens"
    chart = Chart(title="Loss while training", svg=_curves(story, faint=True), note=f"{note}; thin: training, smoothed")
    return (
        Prose(text=words),
        chart,
        Chart(title="The last half, held-out text", svg=_curves(story, faint=False), note=note),
    )


def _curves(story: Story, *, faint: bool) -> str:
    series = []
    for index, name in enumerate((HYBRID, TWIN)):
        curve = story.curves[name]
        points = curve["validation"]
        if faint:
            smooth = _smoothed(curve["training"])
            series.append(Series(name="", index=index, points=smooth, faint=True))
        else:
            points = points[len(points) // 2 :]
        series.append(Series(name=name, index=index, points=points, dots=True))
    x = Axis(label="tokens", show=lambda v: f"{v / 1000:,.0f}k" if v >= 1000 else f"{v:g}")
    y = Axis(label="nats per token", show="{:.3g}".format)
    return line_chart(series, x, y, title="loss of both models over training tokens")


def _smoothed(points: list[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """Means of neighbours, at most so many points."""
    width = max(1, len(points) // most)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], statistics.fmean(loss for _, loss in group)) for group in groups]
