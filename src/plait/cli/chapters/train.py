"""Second chapter: train the hybrid and its Transformer twin on the same tokens in the same order.

The number of steps is chosen from the measured speed of both, so that a slower machine trains for as long on fewer
tokens; both always make the same steps.
"""

import math
import statistics

import torch

from plait.cli.chapters import twins
from plait.cli.chapters.pace import TURNS, VALIDATIONS, Watch, calibrate, steps_within
from plait.cli.chapters.story import HYBRID, TWIN, Story
from plait.cli.drawing import count
from plait.cli.machine import speed
from plait.cli.page.blocks import Block, Chart, Prose, Section
from plait.cli.page.chart import Axis, Series, line_chart
from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.model.hybrid import Hybrid, build
from plait.text.tokenizer import Tokenizer
from plait.train.loop import Outcome, TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.optim import Optim
from plait.train.pretrain import NextToken
from plait.train.progress import progress
from plait.train.schedule import Schedule

VALIDATION_TOKENS = 16384
OPTIM = Optim(kind="muon", weight_decay=0.1)
PEAK_LR = 4e-3


def tell(story: Story) -> Section:
    """Train both models; leaves them in story.models and their curves in story.curves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = "bf16" if speed(device).has_fast_bf16 else "fp32"
    tokenizer = Tokenizer.open(story.tokenizer)
    first = twins.hybrid(story.scale, tokenizer.vocab_size, tokenizer.eos_ids[0])
    configs = {HYBRID: first, TWIN: twins.twin(first)}
    objective = objective_of(story)
    params = {name: config.cost().params for name, config in configs.items()}
    story.compare("parameters", {name: count(n) for name, n in params.items()}, params, "")
    if story.threads.choose() < story.threads.all:
        story.say("other programs are busy: one thread is faster than several, and will do")
    seconds = calibrate(configs, objective, OPTIM, recipe, device)
    rates = {name: objective.loader.tokens_per_step / s for name, s in seconds.items()}
    story.compare("training speed", {n: f"{r:,.0f}" for n, r in rates.items()}, rates, "tokens/s", TURNS)
    steps = steps_within(story, objective, seconds)
    story.say(
        f"{count(first.cost().params)} parameters each, {recipe}, {steps} steps of "
        f"{objective.loader.tokens_per_step} tokens: {steps * sum(seconds.values()):.0f} s for both"
    )
    outcomes = {}
    for name, config in configs.items():
        model = build(config, recipe, device, seed=story.seed)
        outcomes[name] = _train(story, name, model, objective, steps, rates[name])
        story.models[name] = model.eval()
    return Section(name="train", title="Training both", blocks=_report(story, outcomes, recipe, objective))


def objective_of(story: Story) -> NextToken:
    """Next tokens of the story's text, and the held-out tokens that every chapter validates on."""
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


def _train(story: Story, name: str, model: Hybrid, objective: NextToken, steps: int, rate: float) -> Outcome:
    curve = story.curves[name] = {"training": [], "validation": []}

    def note(facts: StepFacts) -> None:
        if facts.applied:
            curve["training"].append((float(facts.tokens), facts.loss))
        if facts.validation_loss is not None:
            curve["validation"].append((float(facts.tokens), facts.validation_loss))

    story.say(f"{name} {model.config.pattern}")
    settings = TrainConfig(
        steps=steps,
        optim=OPTIM,
        # short runs gain most from a long decay
        schedule=Schedule(peak=PEAK_LR, warmup_steps=max(1, steps // 20), decay_steps=steps // 2, decay="linear"),
        validate_every=-(-steps // VALIDATIONS),
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
        observers=[progress(steps), Watch(story.threads, rate)],
    )
    model.origin = story.tokenizer
    return outcome


def bits_per_byte(loss: float, story: Story) -> float:
    """A validation loss in a unit that does not depend on the vocabulary."""
    data, tokenizer = Dataset.open(story.valid_data), Tokenizer.open(story.tokenizer)
    n_bytes = sum(len(tokenizer.decode(data.document(i).tolist()).encode()) for i in range(data.n_documents))
    tokens = data.n_tokens - data.n_documents
    return loss * tokens / max(n_bytes, 1) / math.log(2)


def _report(story: Story, outcomes: dict[str, Outcome], recipe: str, objective: NextToken) -> tuple[Block, ...]:
    steps, tokens = outcomes[HYBRID].steps, outcomes[HYBRID].tokens
    story.report.add("training steps", steps)
    story.report.add("training tokens", tokens, "tokens")
    story.report.add("training precision", recipe)
    losses = {name: outcome.validation_loss for name, outcome in outcomes.items()}
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    bits = {name: bits_per_byte(loss, story) for name, loss in losses.items()}
    story.compare("validation loss", {n: f"{loss:.3f}" for n, loss in losses.items()}, losses, "nats/token")
    story.compare("validation loss per byte", {n: f"{loss:.3f}" for n, loss in bits.items()}, bits, "bits/byte")
    for name, outcome in outcomes.items():
        # the mean of a run on a machine that others use as well; the measured speed above is the fairer one
        story.report.add(f"{name} training run", outcome.tokens_per_s, "tokens/s", outcome.steps)
    epochs = steps / objective.loader.n_steps_per_epoch()
    scale = story.scale
    words = (
        f"Both are trained from scratch on the same {tokens:,} tokens in the same order: {steps:,} steps of "
        f"{scale.batch_size} x {scale.seq_len}, {epochs:.2f} times through the text, with Muon and the same schedule "
        f"(warm-up, stable, linear decay), in {recipe.upper()} over FP32 master weights. The number of steps was "
        f"chosen so that the demo fits into {story.minutes:g} minutes on this machine."
    )
    if story.threads.was_crowded:
        words += " Other programs were busy meanwhile, so that all speeds are low and uneven."
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


def _smoothed(points: list[tuple[float, float]], most: int = 50) -> list[tuple[float, float]]:
    """Means of neighbours, at most so many points."""
    width = max(1, len(points) // most)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], statistics.fmean(loss for _, loss in group)) for group in groups]
