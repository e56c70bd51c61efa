"""Puzzle's stage before its search: options for every layer, what they have learnt, and the harm that each does.

None of it depends on a budget: another budget is searched in the same library, in seconds.

    FOLDER/weights/layer-007/NAME.safetensors     what may stand in a layer's place (replace.py, local.py)
    FOLDER/single.json                            the harm of each by itself (single.py)
    FOLDER/widths.json                            the harm of a narrower model
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from plait.compress.costs import Costs
from plait.compress.grid import space_around
from plait.compress.job import Job
from plait.compress.local import teach
from plait.compress.plan import shrunk
from plait.compress.prune import prune
from plait.compress.puzzle import Problem
from plait.compress.replace import library
from plait.compress.score import Scores
from plait.compress.single import Harm, harm_of, score_library
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid
from plait.train.metrics import write_whole

WEIGHTS, WIDTHS = "weights", "widths.json"


def make(
    folder: Path,
    job: Job,
    checkpoint: Checkpoint,
    teacher: Hybrid,
    scores: Scores,
    lessons: Callable[[int], Sequence[Batch]],
    held_out: Sequence[Batch],
) -> None:
    """Fill a folder, or go on filling it.

    Args:
        folder: see the file.
        job: what the options are and how they learn.
        checkpoint, teacher, scores: the model, as it is stored and as it runs, and what its parts are worth.
        lessons: the micro-batches of a step of learning.
        held_out: text on which harm is measured.
    """
    replacements = library(checkpoint.config, job.menu)
    how = replace(job.lessons, seed=job.seed)
    teach(teacher, checkpoint, scores, replacements, lessons, folder / WEIGHTS, how)
    score_library(teacher, replacements, folder / WEIGHTS, held_out, folder)
    found = {}
    for d_model in widths(job, checkpoint.config):
        narrow = prune(checkpoint, shrunk(checkpoint.config, d_model=d_model), scores)
        found[str(d_model)] = asdict(
            harm_of(teacher, narrow.model(device=teacher.device, verify=False).eval(), held_out)
        )
    write_whole(folder / WIDTHS, json.dumps(found, indent=1) + "\n")


def problem(folder: Path, job: Job, teacher: Hybrid, costs: Costs) -> Problem:
    """What `make` has left, as what a search chooses from."""
    replacements = library(teacher.config, job.menu)
    harms = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
    return Problem(
        teacher=teacher.config,
        replacements=replacements,
        # all of it is there, so that no text is read
        table=score_library(teacher, replacements, folder / WEIGHTS, (), folder),
        weights=folder / WEIGHTS,
        costs=costs,
        widths={int(d_model): Harm(**harm) for d_model, harm in harms.items()},
    )


def widths(job: Job, teacher: ModelConfig) -> list[int]:
    """Widths of the model below the teacher's that are offered."""
    return list(space_around(teacher, width=job.space.width, steps=job.space.steps).d_model[1:])
