"""The way from a teacher and a budget to a student: stages, each of which is kept and never made twice.

    profile   what the teacher costs, and what that makes of the budget
    score     how important layers, heads, neurons and channels are
    library   of Puzzle: replacements for every layer, and the harm that each does
    search    plans within the budget, ranked; baselines; why
    realise   the best plans and the baselines, cut out of the teacher            one stage each: realise-0, ...
    answers   the teacher's likeliest tokens on the disk, if they are asked for
    short     a short distillation of each                                        one stage each: short-0, short-depth
    choose    the one with the lowest validation loss, which is seldom the first: rankings flip in training
    distil    the chosen one on all the tokens; baselines too, if asked           distil, distil-depth, ...
    extend    a phase on longer rows, if asked
    verify    student, teacher and baselines: losses, agreement, tasks, measured speed

Source   NVIDIA 2025, arXiv:2504.03624 section 2.3 (MiniPuzzle); arXiv:2508.14444 section 4 (Nano 2).
"""

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from plait.compress.costs import Costs
from plait.compress.distill import MODEL, Data, Later, distil, keep, outcome_of, student
from plait.compress.found import Found, Given, Named, search
from plait.compress.grid import space_around
from plait.compress.job import Job, Long
from plait.compress.layers import score_layers
from plait.compress.local import teach
from plait.compress.plan import Plan, shrunk
from plait.compress.prune import kept_channels, prune
from plait.compress.puzzle import Problem
from plait.compress.replace import library
from plait.compress.score import Scores, score
from plait.compress.single import Harm, harm_of, score_library
from plait.compress.stages import Stages
from plait.compress.verify import Judge, Subject, verify
from plait.config import to_dict
from plait.data.loader import Batch
from plait.formats.checkpoint import Checkpoint
from plait.model.hybrid import Hybrid, build
from plait.train.answers import Answers, write_answers
from plait.train.distill import Distill, DistillAnswers, Streams
from plait.train.loop import TrainConfig
from plait.train.metrics import Observer, write_whole
from plait.train.objective import Objective
from plait.train.pretrain import NextToken

log = logging.getLogger(__name__)

SCORES, FOUND, CHOICE, PROFILE = "scores.safetensors", "search.json", "choice.json", "profile.json"
WIDTHS = "widths.json"


@dataclass(slots=True, kw_only=True)
class Teacher:
    """The model to learn from; read when a stage needs it, and let go of between stages.

    checkpoint: where it lies. identity: what it is (stages.identity_of). recipe: precision, None as it is stored.
    """

    checkpoint: Checkpoint
    identity: str
    device: str = "cpu"
    recipe: str | None = None
    held: dict[str | None, Hybrid] = field(default_factory=dict)

    def exact(self) -> Hybrid:
        """As it is stored."""
        return self._model(None)

    def taught(self) -> Hybrid:
        """In the precision in which it teaches."""
        return self._model(self.recipe)

    def let_go(self) -> None:
        """Give its memory back."""
        self.held.clear()
        gc.collect()

    def _model(self, recipe: str | None) -> Hybrid:
        if recipe not in self.held:
            self.held.clear()
            model = self.checkpoint.model(recipe=recipe, device=self.device)
            self.held[recipe] = model.requires_grad_(False).eval()
        return self.held[recipe]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a compression is given from outside. observe: makes what watches a run of so many updates.

    judge: gives the task scores of a model by name, None for none. say: told in words what goes on.
    """

    observe: Callable[[int], Sequence[Observer]] = lambda steps: ()
    judge: Judge | None = None
    judged: object = None
    say: Callable[[str], None] = log.info


class Compression:
    """One job on one teacher, in one output folder."""

    def __init__(
        self, job: Job, teacher: Teacher, data: Data, costs: Costs, stages: Stages, tools: Tools | None = None
    ) -> None:
        """
        Args:
            job: what to do.
            teacher: to learn from.
            data: to learn on.
            costs: of the job's load and numbers, by its clock.
            stages: of the output folder.
            tools: see there.
        """
        self.job, self.teacher, self.data, self.costs, self.stages = job, teacher, data, costs, stages
        self.tools = tools or Tools()
        self.config = teacher.checkpoint.config
        self.origin = teacher.checkpoint.folder
        self.base: dict[str, object] = {"teacher": teacher.identity, "seed": job.seed}

    def run(self) -> Path:
        """All stages; those that are done are not made again.

        Returns: the folder of the last one, with verify.json.
        """
        found = self.found()
        told = self.answers()
        shorts = {one.name: self.short(one, told) for one in (*found.plans, *found.baselines)}
        plans = {one.name: one for one in (*found.plans, *found.baselines)}
        choice = self.choose({one.name: shorts[one.name] for one in found.plans})
        chosen = plans[json.loads((choice / CHOICE).read_text(encoding="utf-8"))["chosen"]]
        final = self.distil("distil", chosen, shorts[chosen.name], told)
        others = {one.name: shorts[one.name] for one in found.baselines}
        if self.job.full:
            others = {
                one.name: self.distil(f"distil-{one.name}", one, shorts[one.name], told) for one in found.baselines
            }
        if "scratch" in self.job.baselines:
            others["scratch"] = self.scratch(chosen)
        return self.verify(final, chosen, others, shorts, plans)

    # --- one method per stage -------------------------------------------------------------------------------------

    def profile(self) -> Path:
        """What the teacher costs, and the ceilings that this makes of the budget."""
        job = self.job

        def make(folder: Path) -> None:
            total = self.costs.total(self.config)
            facts = {"teacher": asdict(total) | {"total_bytes": total.total_bytes}}
            facts["ceilings"] = job.budget.against(total).ceilings()
            write_whole(folder / PROFILE, json.dumps(facts, indent=1) + "\n")

        wanted = {"budget": to_dict(job.budget), **self._costing()}
        return self.stages.run("profile", {"config": self.config.to_dict(), **wanted}, make)

    def score(self) -> Path:
        """Importance of everything that may be cut."""
        job = self.job
        rows = job.teaching.rows

        def make(folder: Path) -> None:
            model = self.teacher.exact()
            batches = self._batches(job.scoring.batches)
            scores = score(model, batches, folder=folder / "width", seed=job.seed)
            few = batches[: job.scoring.layer_batches]
            layers = score_layers(model, few, rounds=job.scoring.rounds, folder=folder / "layers")
            scores.with_layers(layers).save(folder / SCORES)

        inputs = {**self.base, "data": self.data.identity(), "rows": to_dict(rows), "scoring": to_dict(job.scoring)}
        return self.stages.run("score", inputs, make)

    def library(self) -> Path:
        """Replacements of every layer, what they have learnt and how much harm each does; the same for any budget."""
        job = self.job

        def make(folder: Path) -> None:
            teacher, source = self.teacher.exact(), self.teacher.checkpoint
            texts = self.data.loader(job.teaching.rows, seed=job.seed + 3)
            replacements = library(self.config, job.menu)
            lessons = replace(job.lessons, seed=job.seed)
            teach(
                teacher, source, self._scores(), replacements, lambda i: [texts.batch(i)], folder / "weights", lessons
            )
            held_out = self._batches(job.ranking, first=job.scoring.batches)
            score_library(teacher, replacements, folder / "weights", held_out, folder)
            widths = {}
            for d_model in self._widths():
                narrow = prune(source, shrunk(self.config, d_model=d_model), self._scores())
                model = narrow.model(device=self.teacher.device, verify=False).eval()
                widths[str(d_model)] = asdict(harm_of(teacher, model, held_out))
            write_whole(folder / WIDTHS, json.dumps(widths, indent=1) + "\n")

        inputs = {**self.base, "scores": self.score(), "data": self.data.identity(), "ranking": job.ranking}
        inputs |= {"rows": to_dict(job.teaching.rows), "menu": to_dict(job.menu), "lessons": to_dict(job.lessons)}
        return self.stages.run("library", inputs | {"widths": self._widths()}, make)

    def found(self) -> Found:
        """Plans within the budget, and baselines."""
        folder = self.searched()
        return Found.from_dict(json.loads((folder / FOUND).read_text(encoding="utf-8")), folder)

    def searched(self) -> Path:
        """The search for them."""
        job, profile, scored = self.job, self.profile(), self.score()
        library = self.library() if job.method == "puzzle" else None

        def make(folder: Path) -> None:
            given = Given(
                job=job,
                checkpoint=self.teacher.checkpoint,
                teacher=self.teacher.exact(),
                scores=self._scores(),
                costs=self.costs,
                budget=job.budget.against(self.costs.total(self.config)),
                batches=self._batches(job.ranking, first=job.scoring.batches),
                folder=folder,
                say=self.tools.say,
                problem=None if library is None else self._problem(library),
            )
            found = search(given)
            write_whole(folder / FOUND, json.dumps(found.to_dict(folder), indent=1) + "\n")

        inputs = {
            **self.base,
            "profile": profile,
            "scores": scored,
            "library": library,
            "method": job.method,
            "space": to_dict(job.space),
            "ranking": job.ranking,
            "candidates": job.candidates,
            "keep": job.keep,
            "baselines": [name for name in job.baselines if name != "scratch"],
        }
        return self.stages.run("search", inputs, make)

    def realise(self, one: Named) -> Path:
        """A plan as a checkpoint."""
        scored, searched = self.score(), self.searched()

        def make(folder: Path) -> None:
            keep(one.cut(self.teacher.checkpoint, self._scores_of(one)), folder, self._tokenizer())

        inputs = {**self.base, "scores": scored, "cut": one.to_dict(searched) | {"name": "", "facts": {}}}
        if one.scores is not None or one.plan.replaced:
            inputs["search"] = searched
        return self.stages.run(f"realise-{one.name}", inputs, make)

    def answers(self) -> Path | None:
        """What the teacher says to the batches of the distillation, if it is to be kept."""
        teaching = self.job.teaching
        if not teaching.top:
            return None

        def make(folder: Path) -> None:
            goal = self._text()
            write_answers(
                folder / "answers",
                goal,
                self.teacher.taught(),
                draws=teaching.main_steps,
                k=teaching.top,
                temperature=teaching.temperature,
                name=self.teacher.identity,
            )

        inputs = {**self.base, **self._reading(), "steps": teaching.main_steps, "top": teaching.top}
        inputs |= {"temperature": teaching.temperature, "held": teaching.teacher}
        return self.stages.run("answers", inputs, make)

    def short(self, one: Named, told: Path | None) -> Path:
        """A candidate after a short distillation."""
        start = self.realise(one)
        return self._distil(f"short-{one.name}", one, start, told, first=0, steps=self.job.teaching.short_steps)

    def choose(self, shorts: Mapping[str, Path]) -> Path:
        """The candidate with the lowest validation loss; the first of equals."""

        def make(folder: Path) -> None:
            losses = {name: outcome_of(path)["validation_loss"] for name, path in shorts.items()}
            chosen = min(losses, key=lambda name: float(str(losses[name])))
            write_whole(folder / CHOICE, json.dumps({"chosen": chosen, "losses": losses}, indent=1) + "\n")

        return self.stages.run("choose", {**self.base, "shorts": dict(shorts)}, make)

    def distil(self, stage: str, one: Named, start: Path, told: Path | None) -> Path:
        """The rest of the tokens, and the phase on longer rows."""
        teaching = self.job.teaching
        first = teaching.short_steps
        steps = teaching.main_steps - first
        done = start if steps < 1 else self._distil(stage, one, start, told, first=first, steps=steps)
        if teaching.long is None:
            return done
        longer = stage.replace("distil", "extend", 1)
        return self._distil(longer, one, done, None, first=0, steps=teaching.long_steps, long=teaching.long)

    def scratch(self, one: Named) -> Path:
        """The chosen sizes with fresh weights, trained on the text of the distillation alone."""
        teaching = self.job.teaching

        def make(folder: Path) -> None:
            def start() -> Hybrid:
                return build(one.plan.config, teaching.precision, device=self.teacher.device, seed=self.job.seed)

            self._train(folder, start, self._text(), one, teaching.main_steps, name="scratch")

        inputs = {**self.base, **self._reading(), "config": one.plan.config.to_dict(), "steps": teaching.main_steps}
        return self.stages.run("distil-scratch", inputs | {"lr": teaching.peak(one.plan.config.d_model)}, make)

    def verify(
        self,
        final: Path,
        chosen: Named,
        others: Mapping[str, Path],
        shorts: Mapping[str, Path],
        plans: Mapping[str, Named],
    ) -> Path:
        """Everything that the report tells of the models."""
        job, tools = self.job, self.tools

        def make(folder: Path) -> None:
            rows = [Subject(name="student", folder=final, plan=chosen.plan)]
            for name, path in others.items():
                rows.append(Subject(name=name, folder=path, plan=plans[name].plan if name in plans else chosen.plan))
            verify(
                folder,
                self.teacher.exact(),
                rows,
                job=job,
                costs=self.costs,
                batches=list(self._text().validation()),
                judge=tools.judge,
                say=tools.say,
            )
            self.teacher.let_go()

        inputs = {**self.base, "student": final, "others": dict(others), "judged": tools.judged, **self._costing()}
        inputs |= {"validation": job.teaching.validation_batches}
        return self.stages.run("verify", inputs, make)

    # --- what they share ------------------------------------------------------------------------------------------

    def _distil(
        self,
        stage: str,
        one: Named,
        start: Path,
        told: Path | None,
        *,
        first: int,
        steps: int,
        long: Long | None = None,
    ) -> Path:
        teaching = self.job.teaching

        def make(folder: Path) -> None:
            goal = self._text(long)
            taught: Objective
            if told is not None:
                taught = DistillAnswers(goal, Answers(told / "answers"), share=teaching.share)
                self.teacher.let_go()
            else:
                how = {"share": teaching.share, "temperature": teaching.temperature, "name": self.teacher.identity}
                taught = Distill(goal, self.teacher.taught(), streams=self._streams(one), **how)
            self._train(
                folder,
                lambda: student(start, teaching.precision, self.teacher.device),
                Later(taught, first),  # type: ignore[arg-type]
                one,
                steps,
                name=start.name,
            )

        inputs = {
            **self.base,
            **self._reading(long),
            "start": start,
            "answers": told,
            "first": first,
            "steps": steps,
            "share": teaching.share,
            "temperature": teaching.temperature,
            "streams": teaching.streams,
            "held": teaching.teacher,
            "lr": teaching.peak(one.plan.config.d_model),
        }
        return self.stages.run(stage, inputs, make)

    def _train(
        self, folder: Path, start: Callable[[], Hybrid], goal: Objective, one: Named, steps: int, *, name: str
    ) -> None:
        teaching = self.job.teaching
        config = TrainConfig(
            steps=steps,
            optim=teaching.optim,
            schedule=teaching.schedule(one.plan.config.d_model, steps),
            save_minutes=teaching.save_minutes,
            save_every=teaching.save_every,
            keep=1,
            compile="off" if self.teacher.device == "cpu" else "auto",
        )
        watchers = self.tools.observe(steps)
        distil(
            folder, start, goal, config, name=name, seed=self.job.seed, tokenizer=self._tokenizer(), observers=watchers
        )

    def _text(self, long: Long | None = None) -> NextToken:
        rows = self.job.teaching.rows if long is None else long.rows
        # longer rows are cut from other places
        seed = self.job.seed + (long is not None)
        return self.data.objective(rows, seed=seed, validation_batches=self.job.teaching.validation_batches)

    def _reading(self, long: Long | None = None) -> dict[str, object]:
        teaching = self.job.teaching
        return {
            "data": self.data.identity(),
            "rows": to_dict(teaching.rows if long is None else long.rows),
            "precision": teaching.precision,
            "optim": to_dict(teaching.optim),
            "validation": teaching.validation_batches,
        }

    def _widths(self) -> list[int]:
        """Widths of the model below the teacher's that a choice per layer may take."""
        reach = self.job.space
        return list(space_around(self.config, width=reach.width, steps=reach.steps).d_model[1:])

    def _problem(self, folder: Path) -> Problem:
        replacements = library(self.config, self.job.menu)
        # all of it is there, and read
        table = score_library(self.teacher.exact(), replacements, folder / "weights", (), folder)
        widths = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
        return Problem(
            teacher=self.config,
            replacements=replacements,
            table=table,
            weights=folder / "weights",
            costs=self.costs,
            widths={int(d_model): Harm(**harm) for d_model, harm in widths.items()},
        )

    def _costing(self) -> dict[str, object]:
        job = self.job
        return {
            "load": to_dict(job.load),
            "numbers": to_dict(job.numbers),
            "device": job.device,
            "reserve": job.reserve,
        }

    def _batches(self, n: int, first: int = 0) -> list[Batch]:
        """Calibration text, in another order than that of the distillation."""
        loader = self.data.loader(self.job.teaching.rows, seed=self.job.seed + 2)
        return [loader.batch(first + i) for i in range(n)]

    def _scores(self) -> Scores:
        return Scores.load(self.score() / SCORES)

    def _scores_of(self, one: Named) -> Scores:
        return self._scores() if one.scores is None else Scores.load(self.searched() / one.scores)

    def _streams(self, one: Named) -> Streams | None:
        weight = self.job.teaching.streams
        if not weight:
            return None
        narrow = one.plan.config.d_model < self.config.d_model
        channels = kept_channels(one.plan, self._scores_of(one)) if narrow else None
        return streams_of(one.plan, len(self.config.layers), channels, weight)

    def _tokenizer(self) -> Path | None:
        return self.origin if (self.origin / "tokenizer.json").is_file() else None


def streams_of(plan: Plan, n_layers: int, channels: tuple[int, ...] | None, weight: float) -> Streams:
    """Which streams of student and teacher belong together: what each layer of the student is to hand on.

    The layer after student layer i is the teacher's kept[i + 1], which is used to the stream after all teacher layers
    before it, those that were dropped included; the last one meets the teacher's last stream.
    """
    ends = (*plan.kept[1:], n_layers)
    return Streams(weight=weight, pairs=tuple((i + 1, end) for i, end in enumerate(ends)), channels=channels)


def model_of(folder: Path) -> Path:
    """The checkpoint in a stage's folder."""
    return folder / MODEL
