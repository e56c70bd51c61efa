"""Seventh chapter: the hybrid cut down to a budget: two thirds of its memory at a long context, and faster.

What `plait compress` does, in a miniature: score everything, count the models that fit, rank a few, distil the best of
them for a moment, choose, and distil the chosen one for as long as the demo has time.
"""

import json
from pathlib import Path

import torch

from plait.cli.chapters.bits import steps_within
from plait.cli.chapters.pace import calibrate
from plait.cli.chapters.story import HYBRID, Story
from plait.cli.chapters.train import OPTIM, objective_of
from plait.cli.compressing import figures, pages
from plait.cli.compressing.results import Results, note
from plait.cli.drawing import count, size
from plait.cli.page.blocks import Block, Patterns, Prose, Section
from plait.cli.plan import machine_here
from plait.compress.budget import Budget
from plait.compress.costs import Costs, Load
from plait.compress.distill import Data, Rows
from plait.compress.job import Job, Reach, Scoring, Teaching
from plait.compress.numbers import Numbers
from plait.compress.pipeline import Compression
from plait.compress.roofline import Roofline
from plait.compress.stages import Stages, identity_of
from plait.compress.teacher import Teacher, Tools
from plait.config import to_dict
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint
from plait.train.metrics import write_whole
from plait.train.progress import progress

# of the hybrid's memory under the load, and times its speed
MEMORY, SPEEDUP = 0.67, 1.2
KEEP, BASELINES = 2, ("depth", "width")
# of the steps that there is time for: the chosen one's; the rest are short distillations of all
OF_STEPS = 0.6


def tell(story: Story) -> Section:
    """Compress the hybrid, and say what it cost and what it was worth."""
    out = story.out / "hybrid-compressed"
    source = Checkpoint.open(story.out / "hybrid-hf")
    job, costs = _job(story, source)
    data = Data(train=Dataset.open(story.train_data), valid=Dataset.open(story.valid_data))
    held = Teacher(checkpoint=source, identity=identity_of(source.folder), device=story.models[HYBRID].device.type)
    stages = Stages(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "job.json", json.dumps(to_dict(job), indent=1) + "\n")
    tools = Tools(observe=lambda steps: [progress(steps)], say=lambda line: story.say(f"  {line}"))
    Compression(job, held, data, costs, stages, tools).run()
    note(out, HYBRID, stages.ran)
    results = Results.read(out)
    results.publish(source)
    teacher, student = (results.model(name) for name in ("teacher", "student"))
    ratios = pages.ratios(results, "student")
    story.say(
        f"  {count(student['costs']['params'])} parameters instead of {count(teacher['costs']['params'])}, "
        f"loss {student['validation_loss']:.3f} instead of {teacher['validation_loss']:.3f}"
    )
    for name, value in ratios.items():
        story.report.add(f"{HYBRID} compressed, {name} over the whole", value)
    for model in results.models[1:]:
        story.report.add(
            f"{HYBRID} compressed, {model['name']} validation loss", model["validation_loss"], "nats/token"
        )
    return Section(name="compress", title="To a budget", blocks=_blocks(story, results, out))


def _job(story: Story, source: Checkpoint) -> tuple[Job, Costs]:
    """A budget, and as many tokens as there is time for."""
    model, scale = story.models[HYBRID], story.scale
    precision = "bf16" if model.recipe.compute == torch.bfloat16 else "fp32"
    clock = Roofline(machine=machine_here(model.recipe.compute.itemsize))
    load, numbers = Load(context=scale.contexts[-1]), Numbers(weights=precision, kv=precision)
    costs = Costs(load=load, numbers=numbers, clock=clock)
    seconds = calibrate({HYBRID: source.config}, objective_of(story), OPTIM, precision, model.device.type)[HYBRID]
    # a student's step and the teacher's answer to it take about as long as a step of the teacher
    steps = steps_within(story, seconds)
    rows = Rows(seq_len=scale.seq_len, batch_size=scale.batch_size)
    main = max(2, round(steps * OF_STEPS))
    short = max(1, round(steps * (1 - OF_STEPS) / (KEEP + len(BASELINES))))
    story.say(f"{main} steps of the student, {short} of each candidate: {steps * seconds:.0f} s")
    job = Job(
        budget=Budget(total_bytes=MEMORY * costs.total(source.config).total_bytes, min_speedup=SPEEDUP),
        load=load,
        numbers=numbers,
        device="this",
        space=Reach(steps=2),
        keep=KEEP,
        ranking=2,
        candidates=6,
        baselines=BASELINES,
        scoring=Scoring(batches=4, layer_batches=1),
        teaching=Teaching(
            tokens=main * rows.tokens,
            short=min(short, main - 1) * rows.tokens,
            precision=precision,
            rows=rows,
            optim=OPTIM,
            validation_batches=max(1, 16384 // rows.tokens),
        ),
        seed=story.seed,
    )
    return job, costs


def _blocks(story: Story, results: Results, out: Path) -> tuple[Block, ...]:
    job, facts = results.job, results.search["facts"]
    teacher, student = (results.model(name) for name in ("teacher", "student"))
    words = (
        f"The hybrid was to become a model that takes {MEMORY:.0%} of its memory at {job.load.context:,} tokens and "
        f"writes {SPEEDUP:g} times as fast. Every layer, head and neuron was scored on a little text; of "
        f"{facts['cells']:,} ways to cut it, {facts['smaller'] + facts['fitting']:,} are within the budget, and "
        f"{len(facts['ranked'])} at its edge were ranked by what they predict without any training. The best "
        f"{job.keep} learnt from the hybrid for a moment, and the better one of them for {count(job.teaching.tokens)} "
        f"tokens. Beside them stand two models of the same budget made without a search. Memory fell from "
        f"{size(teacher['costs']['total_bytes'])} to {size(student['costs']['total_bytes'])}."
    )
    rows = tuple(
        (name, model["pattern"], f"{count(model['costs']['params'])} parameters")
        for name, model in ((HYBRID, teacher), ("compressed", student))
    )
    more = f"All of it, and why: plait compress explain {out.as_posix()}"
    legend = tuple(pair for pair in pages.LEGEND if pair[0] in teacher["pattern"])
    return (
        Prose(text=words),
        Patterns(models=rows, legend=legend),
        *pages.models(results),
        *figures.importance(results)[:1],
        Prose(text=more),
    )
