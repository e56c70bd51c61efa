"""Makes an elastic model: nested sizes, trained in one run, and compared with students that learnt alone.

score      as for any compression
elastic    one training run of the whole model and all sizes (elastic.py)
alone      each size cut out and distilled by itself on the same tokens, to compare with; one stage each
compare    losses on held-out text:  gap = loss of the slice / loss of the model that learnt alone - 1
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.compress.budget import Budget
from plait.compress.costs import Costs
from plait.compress.distill import MODEL, keep, student
from plait.compress.elastic import WHOLE, Elastic, Sizes
from plait.compress.grid import Space, fit, space_around
from plait.compress.job import Job
from plait.compress.pipeline import Compression
from plait.compress.plan import Plan
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.train.distill import Distill
from plait.train.metrics import write_whole
from plait.train.objective import mean_loss

FILE = "compare.json"


def nested(teacher: ModelConfig, shares: Sequence[float], importance: Sequence[float], job: Job) -> dict[str, Plan]:
    """Plans of at most these shares of the teacher's parameters, each inside the one before.

    Args:
        teacher: the whole.
        shares: between 0 and 1.
        importance: what each layer is worth.
        job: how far sizes may go from the teacher, and in how many steps.

    Returns: share as written -> plan, the largest first.
    Raises: ValueError for a share outside its range; BudgetError for one that nothing fits.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"elastic={','.join(map(str, shares))}: give shares of the parameters between 0 and 1")
    space = space_around(teacher, depth=job.space.depth, width=job.space.width, steps=job.space.steps)
    params = teacher.cost().params
    found: dict[str, Plan] = {}
    for share in sorted(set(shares), reverse=True):
        fitting = fit(teacher, space, importance, Budget(params=int(share * params)), Costs())
        fitting.require()
        worth = {id(p): sum(importance[i] for i in p.kept) / sum(importance) for p in fitting.plans}
        best = max(fitting.plans, key=lambda p: worth[id(p)] + p.config.cost().params / params)
        found[f"{share:g}"] = best
        space = _inside(space, best.config)
    return found


def _inside(space: Space, config: ModelConfig) -> Space:
    """The part of a grid that lies within a model."""
    largest = {spec.symbol: spec for spec in config.layers}
    counts = {s: _up_to(values, config.pattern.count(s)) for s, values in space.counts.items() if s in largest}
    sizes = {
        s: {name: _up_to(values, getattr(largest[s], name)) for name, values in named.items()}
        for s, named in space.sizes.items()
        if s in largest
    }
    return Space(counts=counts, sizes=sizes, d_model=_up_to(space.d_model, config.d_model))


def _up_to(values: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(value for value in values if value <= most)


def elastic(work: Compression, shares: Sequence[float], *, compares: bool) -> Path:
    """Make an elastic model, or go on making it.

    Args:
        work: the teacher, the data, the job (whose budget is of no matter here).
        shares: of the teacher's parameters; see `nested`.
        compares: also distil every size by itself.

    Returns: the folder of the last stage, with compare.json.
    """
    job, teaching = work.job, work.job.teaching
    plans = nested(work.config, shares, work.scores().layers[job.scoring.layers_by], job)
    steps = teaching.main_steps

    def make(folder: Path) -> None:
        source = work.teacher.checkpoint
        sizes = Sizes(plans, work.scores())
        goal = Elastic(
            work.text(),
            work.teacher.taught(),
            source,
            sizes,
            seed=job.seed,
            temperature=teaching.temperature,
            name=work.teacher.identity,
        )

        def start():  # noqa: ANN202
            return source.model(recipe=teaching.precision, device=work.teacher.device, dtype="float32")

        work.train(folder, start, goal, work.config.d_model, steps, name=work.teacher.identity)
        sizes.save(folder / MODEL)

    inputs = {**work.base, **work.reading(), "scores": work.score(), "steps": steps, "held": teaching.teacher}
    inputs |= {"temperature": teaching.temperature, "lr": teaching.peak(work.config.d_model)}
    told = {name: plan.to_dict() for name, plan in plans.items()}
    made = work.stages.run("elastic", inputs | {"sizes": told}, make)
    alone = {name: _alone(work, name, plan, inputs) for name, plan in plans.items()} if compares else {}
    return _compare(work, made, alone)


def _alone(work: Compression, name: str, plan: Plan, inputs: Mapping[str, object]) -> Path:
    teaching = work.job.teaching

    def make(folder: Path) -> None:
        def start():  # noqa: ANN202
            cut = Sizes({name: plan}, work.scores()).slice(work.teacher.checkpoint, name)
            keep(cut, folder / "begin", work.tokenizer())
            return student(folder / "begin", teaching.precision, work.teacher.device)

        goal = Distill(work.text(), work.teacher.taught(), temperature=teaching.temperature, name=work.teacher.identity)
        work.train(folder, start, goal, plan.config.d_model, teaching.main_steps, name=f"{name} of the teacher")

    more = {"sizes": plan.to_dict(), "lr": teaching.peak(plan.config.d_model)}
    return work.stages.run(f"alone-{name}", {**inputs, **more}, make)


def _compare(work: Compression, made: Path, alone: Mapping[str, Path]) -> Path:
    def make(folder: Path) -> None:
        goal = work.text()
        whole = Checkpoint.open(made / MODEL)
        sizes = Sizes.open(made / MODEL)
        rows = []
        for name in (WHOLE, *sizes.plans):
            cut = sizes.slice(whole, name)
            model = cut.model(device=work.teacher.device, verify=False).eval()
            row: dict[str, object] = {"name": name, "pattern": cut.config.pattern, "params": cut.config.cost().params}
            row["loss"] = loss = mean_loss(model, goal, goal.validation())
            if name in alone:
                other = Checkpoint.open(alone[name] / MODEL).model(device=work.teacher.device).eval()
                row["alone"] = separate = mean_loss(other, goal, goal.validation())
                row["gap"] = loss / separate - 1
            rows.append(row)
        teacher = mean_loss(work.teacher.exact(), goal, goal.validation())
        write_whole(folder / FILE, json.dumps({"teacher": teacher, "sizes": rows}, indent=1) + "\n")

    inputs = {**work.base, "elastic": made, "alone": dict(alone), "validation": work.job.teaching.validation_batches}
    return work.stages.run("compare", inputs, make)
