"""What a search has found: the plans to distil, the baselines to compare them with, and how it came to them.

MiniPuzzle   a grid of uniform models, those within the budget, the best of them by what they predict before training
Puzzle       one option per layer, chosen by an integer program over measured replacements; three ways of choosing are
             distilled: by divergence, by loss, and with all layers of a kind alike
Every plan is cut with the teacher's scores; a baseline may bring scores of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from plait.compress import baselines
from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs
from plait.compress.explain import explain
from plait.compress.grid import fit, space_around
from plait.compress.job import Job
from plait.compress.pareto import front
from plait.compress.plan import Plan
from plait.compress.prune import prune
from plait.compress.puzzle import Problem, Puzzle
from plait.compress.puzzle import search as solved
from plait.compress.rank import rank
from plait.compress.score import Scores
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A plan by name. scores: file with those to cut it by, in the search's folder; None for the teacher's.

    as_published: cut without merging twins or rescaling norms. facts: what the search knows of it, JSON-ready.
    """

    name: str
    plan: Plan
    scores: str | None = None
    as_published: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)

    def cut(self, checkpoint: Checkpoint, scores: Scores) -> Checkpoint:
        """The plan as a checkpoint."""
        return prune(checkpoint, self.plan, scores, merge=not self.as_published, rescale=not self.as_published)

    def to_dict(self, folder: Path) -> dict[str, object]:
        """JSON-ready; files are told by their place among the stages, one of which is the search's folder."""
        plan = self.plan.to_dict()
        places = {str(layer): path.relative_to(folder.parent) for layer, path in self.plan.replaced.items()}
        plan["replaced"] = {layer: place.as_posix() for layer, place in places.items()}
        facts: dict[str, object] = {name: getattr(self, name) for name in ("name", "scores", "as_published", "facts")}
        return facts | {"plan": plan}

    @staticmethod
    def from_dict(data: Mapping[str, object], folder: Path) -> "Named":
        """Read what `to_dict` gave."""
        plan = data["plan"]
        assert isinstance(plan, Mapping)
        replaced = {layer: str(folder.parent / place) for layer, place in plan["replaced"].items()}
        return Named(**{**data, "plan": Plan.from_dict({**plan, "replaced": replaced})})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """plans: to distil, best first. baselines. facts: how the search went, JSON-ready."""

    plans: tuple[Named, ...]
    baselines: tuple[Named, ...]
    facts: Mapping[str, object]

    def to_dict(self, folder: Path) -> dict[str, object]:
        """JSON-ready."""
        plans, others = ([one.to_dict(folder) for one in each] for each in (self.plans, self.baselines))
        return {"plans": plans, "baselines": others, "facts": self.facts}

    @staticmethod
    def from_dict(data: Mapping[str, list[Mapping[str, object]]], folder: Path) -> "Found":
        """Read what `to_dict` gave."""
        plans, others = (tuple(Named.from_dict(one, folder) for one in data[key]) for key in ("plans", "baselines"))
        return Found(plans=plans, baselines=others, facts=data["facts"])  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a search works with. budget: with its speedups turned into times. batches: text to rank on.

    folder: to fill. problem: of Puzzle, what it chooses from.
    """

    job: Job
    checkpoint: Checkpoint
    teacher: Hybrid
    scores: Scores
    costs: Costs
    budget: Budget
    batches: Sequence[Batch]
    folder: Path
    say: Callable[[str], None]
    problem: Problem | None = None

    def model(self, plan: Plan) -> Hybrid:
        """A candidate before any training, as the teacher is held."""
        cut = prune(self.checkpoint, plan, self.scores)
        return cut.model(device=self.teacher.device, verify=False).requires_grad_(False).eval()

    def placed(self, config: ModelConfig) -> Mapping[str, float | None]:
        """What a model costs, JSON-ready."""
        total = self.costs.total(config)
        facts = asdict(total) | {"total_bytes": total.total_bytes}
        return {name: None if value != value else value for name, value in facts.items()}


def search(given: Given) -> Found:
    """Plans within the budget, best first, and baselines within it; goes on with what its folder holds.

    Raises: BudgetError if nothing fits, with the nearest that is possible.
    """
    plans, facts = _minipuzzle(given) if given.problem is None else _puzzle(given, given.problem)
    return Found(plans=tuple(plans), baselines=tuple(_baselines(given)), facts=facts)


def _minipuzzle(given: Given) -> tuple[list[Named], dict[str, object]]:
    job, config = given.job, given.teacher.config
    space = space_around(config, depth=job.space.depth, width=job.space.width, steps=job.space.steps)
    fitting = fit(config, space, given.scores.layers[job.scoring.layers_by], given.budget, given.costs)
    fitting.require()
    plans = _promising(fitting.plans, job.candidates, given)
    given.say(
        f"{fitting.cells:,} candidates, {len(fitting.plans):,} at the edge of the budget; {len(plans)} are ranked"
    )
    ranked = rank(given.teacher, plans, given.model, given.batches, given.folder / "ranking", keep=job.keep)
    rows: list[dict[str, object]] = [
        {
            "pattern": one.plan.config.pattern,
            "tokens": one.tokens,
            "accuracy": one.accuracy,
            "agreement": one.agreement,
            "loss": one.loss,
            "costs": given.placed(one.plan.config),
        }
        for one in ranked
    ]
    facts: dict[str, object] = {
        "cells": fitting.cells,
        "reasons": dict(fitting.reasons),
        "smaller": fitting.smaller,
        "fitting": len(fitting.plans),
        "ranked": rows,
    }
    best = ranked[: job.keep]
    return [Named(name=str(i), plan=one.plan, facts={"rank": i} | rows[i]) for i, one in enumerate(best)], facts


def _promising(plans: Sequence[Plan], most: int, given: Given) -> list[Plan]:
    """Those that keep the most important layers and the most parameters, where there are too many to run all."""
    importance, whole = given.scores.layers[given.job.scoring.layers_by], given.teacher.config.cost().params

    def lost(plan: Plan) -> float:
        gone = 1 - sum(importance[i] for i in plan.kept) / max(sum(importance), 1e-30)
        return gone - plan.config.cost().params / whole

    return sorted(plans, key=lost)[:most] if len(plans) > most else list(plans)


def _puzzle(given: Given, problem: Problem) -> tuple[list[Named], dict[str, object]]:
    ways = {
        "by divergence": problem,
        "by loss": replace(problem, by="loss"),
        "alike": replace(problem, homogeneous=True),
    }
    answers: dict[str, Puzzle] = {}
    for way, other in ways.items():
        try:
            answers[way] = solved(other, given.budget)
        except BudgetError as error:
            # layers alike fit no sooner than layers that differ
            if not answers:
                raise
            given.say(f"{way}: {error}")
    plans: list[Named] = []
    reasons: dict[str, object] = {}
    for way, answer in answers.items():
        if all(answer.plan != one.plan for one in plans) and len(plans) < given.job.keep:
            facts = {"way": way, "score": answer.score, "costs": given.placed(answer.plan.config)}
            name = str(len(plans))
            plans.append(Named(name=name, plan=answer.plan, facts=facts))
            # which of them is chosen is known after all have learnt a little
            reasons[name] = explain(answer, given.teacher.config).to_dict() | {"way": way}
    fronts = {
        limit: [point.to_dict() for point in front(problem, limit)]
        for limit in ("total_bytes", "decode_s")
        if given.placed(given.teacher.config)[limit] is not None
    }
    return plans, {"explain": reasons, "fronts": fronts}


def _baselines(given: Given) -> list[Named]:
    """Those that were asked for and fit; one that cannot be made small enough is left out with a word."""
    config, scores, how = given.teacher.config, given.scores, (given.budget, given.costs)
    makers: dict[str, Callable[[], baselines.Baseline]] = {
        "depth": lambda: baselines.depth(config, scores, *how),
        "width": lambda: baselines.width(config, *how),
        "magnitude": lambda: baselines.magnitude(given.checkpoint, scores, *how),
        "random": lambda: baselines.random(config, scores, *how, seed=given.job.seed),
    }
    found = []
    for name, make in makers.items():
        if name not in given.job.baselines:
            continue
        try:
            one = make()
        except BudgetError as error:
            given.say(str(error))
            continue
        path = None
        if one.scores is not None:
            path = f"{name}.safetensors"
            one.scores.save(given.folder / path)
        facts = {"costs": given.placed(one.plan.config)}
        found.append(Named(name=name, plan=one.plan, scores=path, as_published=one.as_published, facts=facts))
    return found
