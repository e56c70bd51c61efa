"""Sixth chapter: the hybrid in fewer bits, as int8 and int4 codes and as a ternary model that it has taught.

Codes of int8 and int4 are made from trained weights in a moment. Ternary weights, of -1, 0 and 1, have to be trained:
the hybrid goes on with weights that become ternary little by little, and learns to say what it said before.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from plait.cli.benches.decode import filled
from plait.cli.chapters.compare import step_seconds
from plait.cli.chapters.pace import Watch, calibrate
from plait.cli.chapters.story import HYBRID, Story
from plait.cli.chapters.train import OPTIM, PEAK_LR, objective_of
from plait.cli.drawing import size
from plait.cli.page.blocks import Block, Chart, Prose, Section, Table
from plait.cli.page.chart import Axis, Series, line_chart
from plait.formats.checkpoint import load, save
from plait.model.hybrid import Hybrid
from plait.precision.linear import Linear
from plait.precision.recipe import Gradual
from plait.precision.ternary import TERNARY
from plait.precision.weight_only import WeightOnlyLinear
from plait.train.distill import Distill
from plait.train.loop import TrainConfig, train
from plait.train.metrics import StepFacts
from plait.train.objective import mean_loss
from plait.train.pretrain import NextToken
from plait.train.progress import progress
from plait.train.schedule import Schedule

# rows of the demo's weights are multiples of 64
CODED = {"int8": "int8-64", "int4": "int4-64"}
CONVERTED = "ternary"
# of the steps: after it all weights are ternary
UNTIL = 0.5
GRADUAL = replace(TERNARY, name="ternary by and by", base="ternary", gradual=Gradual(until=UNTIL))
# of the time that is left, and at least and at most of the whole: training in this chapter
OF_LEFT, LEAST, MOST = 0.6, 0.04, 0.15
VALIDATIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The hybrid in one kind of numbers.

    n_bytes: of all its tensors. bits: a weight of its linear layers takes. loss: held-out text, nats/token.
    speed: of decoding, tokens/s.
    """

    n_bytes: int
    bits: float
    loss: float
    speed: float


def tell(story: Story) -> Section:
    """Make the forms, measure them."""
    trained = story.models[HYBRID]
    folder, device, compute = story.out / "hybrid-hf", trained.device, trained.recipe.compute
    plain = "BF16" if compute == torch.bfloat16 else "FP32"
    models = {plain: load(folder, device=device, dtype=compute)}
    models |= {name: load(folder, device=device, dtype=compute, recipe=recipe) for name, recipe in CODED.items()}
    objective = objective_of(story)
    models[CONVERTED], curve = _converted(story, models[plain], objective)
    forms = _measured(story, models, objective)
    for name, form in forms.items():
        story.say(f"  {name}: {size(form.n_bytes)}, loss {form.loss:.3f}, {form.speed:,.0f} tokens/s")
        story.report.add(f"{HYBRID} in {name}", form.n_bytes, "bytes")
        story.report.add(f"{HYBRID} in {name}, bits of a weight", form.bits, "bits")
        story.report.add(f"{HYBRID} in {name}, validation loss", form.loss, "nats/token")
        story.report.add(f"{HYBRID} in {name}, decode speed", form.speed, "tokens/s")
    return Section(name="bits", title="Fewer bits", blocks=_blocks(story, forms, curve))


def _converted(story: Story, teacher: Hybrid, objective: NextToken) -> tuple[Hybrid, list[tuple[float, float]]]:
    """The packed ternary model, and the validation losses on the way to it, by steps; the first before any training."""
    device, compute = teacher.device, teacher.recipe.compute
    recipe = GRADUAL.computing_in(compute)
    student = load(story.out / "hybrid-hf", device=device, dtype="float32", recipe=recipe)
    goal = Distill(objective, teacher, name=HYBRID)
    curve = [(0.0, mean_loss(student, goal, goal.validation()))]
    seconds = calibrate({HYBRID: student.config}, goal, OPTIM, recipe, device.type)[HYBRID]
    steps = steps_within(story, seconds)
    story.say(f"{steps} steps from {HYBRID} to ternary: {steps * seconds:.0f} s")

    def note(facts: StepFacts) -> None:
        if facts.validation_loss is not None:
            curve.append((float(facts.step), facts.validation_loss))

    settings = TrainConfig(
        steps=steps,
        optim=OPTIM,
        schedule=Schedule(peak=PEAK_LR / 2, warmup_steps=max(1, steps // 20), decay_steps=steps // 2, decay="linear"),
        validate_every=-(-steps // VALIDATIONS),
    )
    rate = objective.loader.tokens_per_step / seconds
    train(student, goal, settings, on_step=note, observers=[progress(steps), Watch(story.threads, rate)])
    folder = save(student, story.out / "hybrid-ternary", format="native", tokenizer=story.tokenizer)
    return load(folder, device=device, dtype=compute, recipe="ternary-packed"), curve


def steps_within(story: Story, seconds: float) -> int:
    """Steps of so many seconds that fit what is left of the story's time, and do not exceed the scale."""
    whole = 60 * story.minutes
    left = whole - (time.monotonic() - story.began)
    budget = min(max(OF_LEFT * left, LEAST * whole), MOST * whole)
    return max(4, min(int(budget / seconds), story.scale.max_steps))


def _measured(story: Story, models: dict[str, Hybrid], objective: NextToken) -> dict[str, Form]:
    story.threads.choose()
    context = story.scale.contexts[0]
    caches = {(name, context): filled(model.eval(), context, seed=story.seed) for name, model in models.items()}
    seconds = step_seconds(models, caches, story.scale.decode_steps)
    return {
        name: Form(
            n_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
            bits=bits_of(model),
            loss=mean_loss(model, objective, objective.validation()),
            speed=1 / statistics.median(seconds[name, context]),
        )
        for name, model in models.items()
    }


def bits_of(model: Hybrid) -> float:
    """Bits that a weight of the blocks' linear layers takes on average, scales included."""
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, Linear | WeightOnlyLinear)]
    n_bytes = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    return 8 * n_bytes / sum(layer.shape[0] * layer.shape[1] for layer in layers)


def _blocks(story: Story, forms: dict[str, Form], curve: list[tuple[float, float]]) -> tuple[Block, ...]:
    (plain, first), *_ = forms.items()
    steps = int(curve[-1][0])
    words = (
        "To write a token, all weights are read once, so fewer bits are faster where reading is what takes the time. "
        "int8 and int4 hold groups of 64 weights as whole numbers with a common scale, made from the trained weights. "
        "Ternary weights are -1, 0 or 1 times one number per matrix; merely rounded, the hybrid would have a loss of "
        f"{curve[0][1]:.2f}. So it was trained on for {steps} steps in which its weights became ternary little by "
        f"little over the first {UNTIL:.0%}, to say what it said before. Embedding, norms, convolutions and the time "
        f"steps of Mamba-2 keep {plain}: in a model this small the embedding is much of what remains."
    )
    rows = tuple(
        (
            name,
            f"{form.bits:.2f}",
            size(form.n_bytes),
            f"{first.n_bytes / form.n_bytes:.2f}",
            f"{form.loss:.3f}",
            f"{form.loss / first.loss - 1:+.1%}",
            f"{form.speed:,.0f}",
            f"{form.speed / first.speed:.2f}",
        )
        for name, form in forms.items()
    )
    context = story.scale.contexts[0]
    table = Table(
        caption="One hybrid in four kinds of numbers.",
        head=("", "bits a weight", "all of it", "smaller", "loss", "", "tokens/s", "faster"),
        rows=rows,
        note=f"bits of linear layers, scales and padding included; held-out text; decoding after {context:,} tokens",
    )
    series = [
        Series(name=name, index=i, points=[(form.n_bytes / 1e6, form.loss)], dots=True)
        for i, (name, form) in enumerate(forms.items())
    ]
    nats = Axis(label="nats per token", show="{:.3g}".format)
    megabytes = Axis(label="MB", show="{:.3g}".format, from_zero=True)
    against = line_chart(series, megabytes, nats, title="loss against size")
    lines = [
        Series(name=CONVERTED, index=len(forms) - 1, points=curve, dots=True),
        Series(name=plain, index=0, points=[(0.0, first.loss), (float(steps), first.loss)]),
    ]
    on_the_way = line_chart(lines, Axis(label="steps"), nats, title="loss of the ternary model while it is trained")
    return (
        Prose(text=words),
        table,
        Chart(title="Loss against size", svg=against, note="held-out text"),
        Chart(title="Becoming ternary", svg=on_the_way, note="held-out text, all weights rounded"),
    )
