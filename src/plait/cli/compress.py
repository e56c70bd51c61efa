"""`plait compress`: the best model that fits a budget, cut out of a trained one and distilled from it.

OUT/model/           the student, with its tokenizer
OUT/report.html      what was tried, what it costs and what it is worth; OUT/report.json is the same as data
OUT/job.json         all settings; `plait compress CHECKPOINT --settings OUT/job.json ...` does it again
OUT/stages/          what every stage has made: a run that was stopped goes on where it was
OUT/blocks.jsonl     measured times of layers, with --device this

With --elastic OUT/model holds several sizes: `plait convert OUT/model DST --to hf --slice 0.8` cuts one out.

`plait compress explain OUT` says for every layer what else it could have been, and why it is what it is.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from plait.cli.compressing import elastic_pages, estimate, explained, pages, texts
from plait.cli.compressing.asked import EXPLAIN, costs_of, here, job_of
from plait.cli.compressing.asked import Inputs as Inputs
from plait.cli.compressing.estimate import BLOCKS
from plait.cli.compressing.results import Results, note
from plait.cli.quiet import quiet
from plait.compress.job import Job
from plait.compress.nested import elastic
from plait.compress.pipeline import Compression
from plait.compress.stages import Stages, UntilError, identity_of
from plait.compress.teacher import Teacher, Tools
from plait.config import ConfigError, to_dict
from plait.evals.suite import DEFAULT, Suite, judge
from plait.formats.checkpoint import Checkpoint
from plait.formats.quantize import holds_codes
from plait.model.hybrid import recipe_of
from plait.precision import RECIPES
from plait.report import Report, provenance
from plait.train.lock import alone
from plait.train.metrics import Observer, write_whole
from plait.train.progress import progress

EXAMPLE = """plait compress runs/first/final --memory 200MiB --context 32k --min-speedup 1.2 --data tokens --tokens 20M
  plait compress downloads/nemotron-h-8b --memory 22GiB --context 128k --device a10g --data texts/ --dry-run
  plait compress runs/first/final --elastic 0.8,0.6 --data tokens --tokens 20M --compare
  plait compress explain runs/first-compressed"""

log = logging.getLogger(__name__)


def run(inputs: Inputs) -> Report:
    """Compress, say what it would take, or explain; what can be refused is refused before anything is written."""
    if inputs.teacher == EXPLAIN:
        return explained.explain(Path(inputs.more[0]))
    assert inputs.data is not None
    job = job_of(inputs, inputs.more)
    teacher = _teacher(Path(inputs.teacher), job)
    out = inputs.out or Path("runs") / f"{name_of(Path(inputs.teacher))}-compressed"
    if inputs.dry_run and inputs.elastic:
        return estimate.elastic(job, teacher, inputs.data, inputs.elastic, compares=inputs.compare)
    if inputs.dry_run:
        with estimate.scratch(out) as blocks:
            return estimate.estimate(job, teacher, inputs.data, costs_of(job, teacher.config, blocks))
    if texts.is_tokens(inputs.data):
        texts.check_length(texts.check_tokens(inputs.data, teacher), job)
    else:
        texts.check_text(inputs.data, teacher, job)
    suite = _suite(inputs, teacher)
    with alone(out):
        folder = inputs.data if texts.is_tokens(inputs.data) else texts.prepared(inputs.data, teacher, out)
        data = texts.check_tokens(folder, teacher)
        texts.check_length(data, job)
        costs = costs_of(job, teacher.config, out / BLOCKS)
        if not inputs.elastic:
            estimate.require(job, teacher.config, costs)
            if estimate.keeps(job, teacher.config, costs):
                log.warning("%s itself is within the budget: nothing needs to go", name_of(teacher.folder))
        write_whole(out / "job.json", json.dumps(to_dict(job), indent=1) + "\n")
        stages = Stages(out, again=inputs.again, until=inputs.until)
        stages.sweep()
        held = Teacher(
            checkpoint=teacher, identity=identity_of(teacher.folder), device=here(), recipe=job.teaching.teacher
        )
        judged = None if suite is None else [[task.name for task in suite.tasks], inputs.task_limit]
        tools = Tools(observe=_watch, judge=suite and judge(suite), judged=judged, say=log.info)
        work = Compression(job, held, data, costs, stages, tools)
        try:
            # which parameter goes to which optimiser is told by plait train; here it would be told for every candidate
            with quiet("plait.train", below=logging.WARNING):
                if inputs.elastic:
                    last = elastic(work, inputs.elastic, compares=inputs.compare)
                    return elastic_pages.write(last, out, name_of(teacher.folder))
                work.run()
        except UntilError as stopped:
            report = Report(str(stopped), provenance=provenance(job.seed))
            report.add("stages made", sum(made for *_, made in stages.ran))
            return report
        note(out, name_of(teacher.folder), stages.ran)
        results = Results.read(out)
        results.publish(teacher)
        report = pages.write(results, out)
        report.add("report", str(out / "report.html"))
    return report


def _teacher(folder: Path, job: Job) -> Checkpoint:
    """The teacher, after seeing that it can be cut and trained on.

    Raises: CheckpointError for a folder that is none we read; ConfigError for weights that cannot be cut.
    """
    teacher = Checkpoint.open(folder)
    if holds_codes(teacher):
        raise ConfigError(f"{folder} holds {teacher.recipe} codes, which cannot be cut; take what they were made from")
    for layer, spec in enumerate(teacher.config.layers):
        if spec.sigma_reparam:
            raise ConfigError(f"{folder}: layer {layer} has sigma_reparam=true, and such layers cannot be cut")
    for name in (job.teaching.precision, job.teaching.teacher):
        if name is not None:
            recipe_of(name)
    if RECIPES.get(job.teaching.precision) and recipe_of(job.teaching.precision).weight_only:
        raise ConfigError(f'precision="{job.teaching.precision}" holds weights as codes, which cannot be trained')
    needs = recipe_of(teacher.recipe)
    if needs.is_needed and recipe_of(job.teaching.precision).name != needs.name:
        raise ConfigError(f'{folder} is a {needs.name!r} model; train its students in that: --precision "{needs.name}"')
    return teacher


def name_of(folder: Path) -> str:
    """What to call a checkpoint: by its folder, or by the one around it where that says more."""
    path = folder.resolve()
    return path.parent.name if path.name in ("final", "model") and path.parent.name else path.name


def _suite(inputs: Inputs, teacher: Checkpoint) -> Suite | None:
    """The tasks to judge by, read and encoded, if there are any.

    Raises: ConfigError if the data or the teacher's tokenizer are not given; ValueError for an unknown task.
    """
    if inputs.eval_data is None:
        if inputs.tasks:
            raise ConfigError(f"tasks={','.join(inputs.tasks)}: say where their data lie, with --eval-data FOLDER")
        return None
    tokenizer = texts.tokenizer_of(teacher)
    if tokenizer is None:
        raise ConfigError(f"tasks need a tokenizer, and {teacher.folder} has no tokenizer.json")
    suite = Suite.open(inputs.eval_data, inputs.tasks or DEFAULT, tokenizer, limit=inputs.task_limit)
    suite.check(teacher.config)
    return suite


def _watch(steps: int) -> Sequence[Observer]:
    return [progress(steps)]
