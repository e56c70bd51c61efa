"""What a compression will take, before it begins: candidates, tokens, hours; and whether the budget can be kept at all.

    seconds = forward passes of scoring, ranking, teaching and validation + training steps of all students
            + of Puzzle, steps of all replacements in the library, and passes that score them

A forward pass of the teacher is timed on a row of random tokens. A training step of a student is taken as three
passes of its own, each in proportion to its parameters; the student is taken as large as the budget allows.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from plait.cli.compressing import texts
from plait.compress import options, puzzle
from plait.compress.budget import SPEEDUPS, BudgetError
from plait.compress.costs import Costs
from plait.compress.explain import shown
from plait.compress.grid import Fit, fit, space_around
from plait.compress.job import STAGES, Job
from plait.compress.library import together
from plait.compress.nested import nested
from plait.compress.rank import rounds_of
from plait.compress.replace import KEEP, library
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.model.layers import KINDS
from plait.report import Report, provenance

# measured times of layers, in the output folder
BLOCKS = "blocks.jsonl"
TIMED = 2
# passes over the calibration text for all width axes together, at most
WIDTH_PASSES = 1.5
# what a pass costs backwards, over what it costs forwards
BACKWARD = 2.0
# of choosing from a library: plans that are distilled, at most
WAYS = 3


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A file for measurements that nobody keeps; it begins with those of the output folder."""
    with tempfile.TemporaryDirectory(prefix="plait-") as folder:
        blocks = Path(folder) / BLOCKS
        if (out / BLOCKS).is_file():
            shutil.copyfile(out / BLOCKS, blocks)
        yield blocks


def fitting(job: Job, teacher: ModelConfig, costs: Costs) -> Fit:
    """The grid's candidates within the budget; layers count alike, as nothing is scored yet."""
    space = space_around(teacher, depth=job.space.depth, width=job.space.width, steps=job.space.steps)

    def ask() -> Fit:
        # only speeds over the teacher's need its times, which may have to be measured
        sizes = job.budget.sizes()
        budget = sizes if job.budget == sizes else job.budget.against(costs.total(teacher))
        return fit(teacher, space, [1.0] * len(teacher.layers), budget, costs)

    return together(costs, ask)


def require(job: Job, teacher: ModelConfig, costs: Costs) -> None:
    """See that something fits the budget.

    Raises: BudgetError with the limit in the way, the nearest that is possible, and what it would cost.
    """
    try:
        if job.method == "minipuzzle":
            fitting(job, teacher, costs).require()
        else:
            puzzle.require(teacher, library(teacher, job.menu), options.widths(job, teacher), job.budget, costs)
    except BudgetError as error:
        speedups = [name for name in SPEEDUPS if getattr(job.budget, name) is not None]
        if not speedups:
            raise
        total = costs.total(teacher)
        words = [f"{SPEEDUPS[name]} {shown(getattr(total, SPEEDUPS[name]), 's')}" for name in speedups]
        raise BudgetError(f"{error}\nThe teacher, for comparison: {', '.join(words)}") from None


def keeps(job: Job, teacher: ModelConfig, costs: Costs) -> bool:
    """Whether the teacher is within the budget itself."""
    sizes = job.budget.sizes()
    if not sizes.judge(replace(costs, clock=None).total(teacher)).ok:
        return False
    total = costs.total(teacher)
    return job.budget == sizes or job.budget.against(total).judge(total).ok


def estimate(job: Job, teacher: Checkpoint, data: Path, costs: Costs) -> Report:
    """The dry run: the plan, stage by stage.

    Raises: BudgetError as `require`; ConfigError for text that does not fit.
    """
    report = Report(f"plait compress {teacher.folder}: the plan", provenance=provenance(job.seed))
    config, teaching = teacher.config, job.teaching
    total = costs.total(config)
    report.add("teacher parameters", total.params)
    report.add("teacher bytes", total.total_bytes, "bytes")
    if total.decode_s == total.decode_s:
        report.add("teacher prefill", total.prefill_s, "s")
        report.add("teacher decode step", total.decode_s, "s")
    for name, ceiling in job.budget.against(total).ceilings().items():
        unit = "bytes" if name.endswith("bytes") else "s" if name.endswith("_s") else ""
        report.add(f"at most {name}", ceiling, unit)
    report.add("teacher is within the budget", "yes, nothing needs to go" if keeps(job, config, costs) else "no")
    tokens = _check(job, teacher, data)
    report.add("tokens of text", tokens, "tokens")
    count = _puzzle if job.method == "puzzle" else _grid
    n_ranked, size = count(report, job, config, costs)
    report.add("of them distilled before the choice", min(job.keep, n_ranked))
    _tell(report, job, teacher, _read(job, teacher, n_ranked, size))
    report.add("student tokens", teaching.tokens, "tokens")
    return report


def elastic(job: Job, teacher: Checkpoint, data: Path, shares: Sequence[float], *, compares: bool) -> Report:
    """The dry run of an elastic model; layers count alike, as nothing is scored yet.

    Raises: BudgetError for a share that nothing fits; ConfigError for text that does not fit.
    """
    report = Report(f"plait compress {teacher.folder} --elastic: the plan", provenance=provenance(job.seed))
    teaching, whole = job.teaching, teacher.config.cost().params
    plans = nested(teacher.config, shares, [1.0] * len(teacher.config.layers), job)
    report.add("whole parameters", whole)
    sizes = []
    for name, plan in plans.items():
        report.add(f"{name} parameters, at most about", plan.config.cost().params)
        sizes.append(plan.config.cost().params / whole)
    report.add("tokens of text", _check(job, teacher, data), "tokens")
    *between, smallest = sizes
    # each step teaches the whole, the smallest, and one of those between them
    taught = 1 + smallest + (statistics.fmean(between) if between else 0.0)
    read, rows = {"score": _scoring(job, teacher.config)}, teaching.rows.tokens
    steps, held_out = teaching.main_steps * rows, teaching.validation_batches * rows
    read["elastic"] = (steps, steps * (1 + (1 + BACKWARD) * taught))
    if compares:
        read["alone"] = (len(sizes) * steps, steps * sum(1 + (1 + BACKWARD) * size for size in sizes))
    losses = 2 + (1 + compares) * sum(sizes)
    read["compare"] = ((2 + (1 + compares) * len(sizes)) * held_out, losses * held_out)
    _tell(report, job, teacher, read)
    return report


def _tell(report: Report, job: Job, teacher: Checkpoint, read: Mapping[str, tuple[int, float]]) -> None:
    """Add tokens that are read and hours by stage; read: stage -> tokens, and passes of the teacher over one."""
    second, hours = _pass_s(teacher, job), 0.0
    for stage in STAGES:
        if stage in read:
            tokens, passes = read[stage]
            report.add(f"{stage} tokens", tokens, "tokens")
            report.add(f"{stage} hours", passes * second / 3600, "h")
            hours += passes * second / 3600
    report.add("hours", hours, "h")


def _grid(report: Report, job: Job, teacher: ModelConfig, costs: Costs) -> tuple[int, float]:
    """Tell of the grid; returns how many candidates are ranked, and a student's parameters over the teacher's."""
    require(job, teacher, costs)
    found = fitting(job, teacher, costs)
    report.add("candidates", found.cells)
    for limit, n in found.reasons.items():
        report.add(f"beyond {limit}", n)
    report.add("within the budget", len(found.plans) + found.smaller)
    n_ranked = min(len(found.plans), job.candidates)
    report.add("of them ranked", n_ranked)
    return n_ranked, max(plan.config.cost().params for plan in found.plans) / teacher.cost().params


def _puzzle(report: Report, job: Job, teacher: ModelConfig, costs: Costs) -> tuple[int, float]:
    """Tell of the library; returns as `_grid`, the size as large as the tightest limit lets it be."""
    require(job, teacher, costs)
    rows, widths = library(teacher, job.menu), [teacher.d_model, *options.widths(job, teacher)]
    report.add("options of all layers", sum(len(row) for row in rows))
    report.add("of them learn", sum(r.learns for row in rows for r in row))
    report.add("widths of the model", len(widths))
    report.add("candidates", float(math.prod(len(row) for row in rows) * len(widths)))
    total = costs.total(teacher)
    shares = [ceiling / getattr(total, name) for name, ceiling in job.budget.against(total).ceilings().items()]
    return WAYS, min(1.0, *shares)


def _check(job: Job, teacher: Checkpoint, data: Path) -> int:
    if texts.is_tokens(data):
        found = texts.check_tokens(data, teacher)
        texts.check_length(found, job)
        return found.train.n_tokens
    texts.check_text(data, teacher, job)
    return texts.guessed_tokens(data, teacher)[0]


def _scoring(job: Job, teacher: ModelConfig) -> tuple[int, float]:
    """Tokens that scores read, and passes of the teacher over a token."""
    rows, layers = job.teaching.rows.tokens, len(teacher.layers)
    width = job.scoring.batches * rows
    depth = sum(layers - i for i in range(job.scoring.rounds)) * job.scoring.layer_batches * rows
    # a layer's removal begins at that layer: half of the model on average
    return width + depth, WIDTH_PASSES * width + depth / 2


def _read(job: Job, teacher: Checkpoint, ranked: int, size: float) -> dict[str, tuple[int, float]]:
    """Tokens that are read by stage, and passes of the teacher over one; size: of a student over the teacher's."""
    teaching, rows = job.teaching, job.teaching.rows.tokens
    read = {"score": _scoring(job, teacher.config)}
    if job.method == "puzzle":
        library_tokens, passes = _library(job, teacher.config)
        read["library"] = (library_tokens, passes)
    ranking = (
        0
        if job.method == "puzzle"
        else sum(n * batches for n, batches in rounds_of(ranked, job.ranking, job.keep)) * rows
    )
    read["search"] = (ranking, size * ranking + (job.ranking * rows if ranking else 0))
    step = 1 + (1 + BACKWARD) * size
    students = min(job.keep, ranked) + len([name for name in job.baselines if name != "scratch"])
    short = students * teaching.short_steps * rows
    read["short"] = (short, step * short)
    runs = 1 + (len(job.baselines) if job.full else 0)
    rest = runs * max(0, teaching.main_steps - teaching.short_steps) * rows
    read["distil"] = (rest, step * rest)
    if teaching.long is not None:
        longer = runs * teaching.long_steps * teaching.long.rows.tokens
        read["extend"] = (longer, step * longer)
    held_out = teaching.validation_batches * rows * (2 + len(job.baselines))
    read["verify"] = (held_out, held_out * size)
    return read


def _library(job: Job, teacher: ModelConfig) -> tuple[int, float]:
    """Tokens that making and scoring a library reads, and passes of the teacher over a token."""
    rows, every = job.teaching.rows.tokens, [r for row in library(teacher, job.menu) for r in row]
    learn = [KINDS[r.spec.symbol].cost(r.spec, teacher.d_model).params for r in every if r.learns and r.spec]
    lessons, held_out = job.lessons.steps * rows, job.ranking * rows
    # narrower models are scored whole, other layers from themselves on: half of the model on average
    scored = 2.0 * len(options.widths(job, teacher)) + 1 + sum(r.name != KEEP for r in every) / 2
    taught = 1 + (1 + BACKWARD) * sum(learn) / teacher.cost().params
    return lessons + held_out, lessons * taught + held_out * scored


def _pass_s(teacher: Checkpoint, job: Job) -> float:
    """Seconds per token of a forward pass of the teacher's sizes, on weights of zero."""
    rows = job.teaching.rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = Hybrid(teacher.config, recipe_of(job.teaching.precision))
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    ids = torch.randint(teacher.config.vocab_size, (1, rows.seq_len), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        for _ in range(TIMED + 1):
            begin = time.perf_counter()
            model.hidden(ids.to(device))[0].sum().item()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) / rows.seq_len
