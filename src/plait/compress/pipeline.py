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

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from plait.compress import options
from plait.compress.costs import Costs
from plait.compress.distill import Data, Later, distil, keep, outcome_of, streams_of, student
from plait.compress.found import Found, Given, Named, search
from plait.compress.job import Job, Long
from plait.compress.layers import score_layers
from plait.compress.prune import kept_channels
from plait.compress.roofline import Roofline
from plait.compress.score import Scores, score
from plait.compress.stages import Stages
from plait.compress.teacher import Teacher, Tools
from plait.compress.verify import Subject, verify
from plait.config import to_dict
from plait.data.loader import Batch
from plait.model.hybrid import Hybrid, build
from plait.model.plan import MACHINES
from plait.train.answers import Answers, write_answers
from plait.train.distill import Distill, DistillAnswers, Streams
from plait.train.loop import TrainConfig
from plait.train.metrics import write_whole
from plait.train.objective import Objective
from plait.train.pretrain import NextToken

log = logging.getLogger(__name__)

SCORES, FOUND, CHOICE, PROFILE = "scores.safetensors", "search.json", "choice.json", "profile.json"


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
        return self.verify(final, chosen, others, plans)

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
            how = {"by": job.scoring.layers_by, "rounds": job.scoring.rounds}
            layers = score_layers(model, few, folder=folder / "layers", **how)
            scores.with_layers(layers).save(folder / SCORES)

        inputs = {**self.base, "data": self.data.identity(), "rows": to_dict(rows), "scoring": to_dict(job.scoring)}
        return self.stages.run("score", inputs, make)

    def library(self) -> Path:
        """Replacements of every layer, what they have learnt and how much harm each does; the same for any budget."""
        job = self.job

        def make(folder: Path) -> None:
            texts = self.data.loader(job.teaching.rows, seed=job.seed + 3)
            options.make(
                folder,
                job,
                self.teacher.checkpoint,
                self.teacher.exact(),
                self.scores(),
                lambda step: [texts.batch(step)],
                self._batches(job.ranking, first=job.scoring.batches),
            )

        inputs = {**self.base, "scores": self.score(), "data": self.data.identity(), "ranking": job.ranking}
        inputs |= {"rows": to_dict(job.teaching.rows), "menu": to_dict(job.menu), "lessons": to_dict(job.lessons)}
        return self.stages.run("library", inputs | {"widths": options.widths(job, self.config)}, make)

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
                scores=self.scores(),
                costs=self.costs,
                budget=job.budget.against(self.costs.total(self.config)),
                batches=self._batches(job.ranking, first=job.scoring.batches),
                folder=folder,
                say=self.tools.say,
                problem=None if library is None else options.problem(library, job, self.teacher.exact(), self.costs),
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
            keep(one.cut(self.teacher.checkpoint, self.scores_of(one)), folder, self.tokenizer())

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
            goal = self.text()
            write_answers(
                folder / "answers",
                goal,
                self.teacher.taught(),
                draws=teaching.main_steps,
                k=teaching.top,
                temperature=teaching.temperature,
                name=self.teacher.identity,
            )

        inputs = {**self.base, **self.reading(), "steps": teaching.main_steps, "top": teaching.top}
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

            self.train(folder, start, self.text(), one.plan.config.d_model, teaching.main_steps, name="scratch")

        inputs = {**self.base, **self.reading(), "config": one.plan.config.to_dict(), "steps": teaching.main_steps}
        return self.stages.run("distil-scratch", inputs | {"lr": teaching.peak(one.plan.config.d_model)}, make)

    def verify(
        self,
        final: Path,
        chosen: Named,
        others: Mapping[str, Path],
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
                batches=list(self.text().validation()),
                judge=tools.judge,
                say=tools.say,
            )
            self.teacher.let_go()

        inputs = {**self.base, "student": final, "others": dict(others), "judged": tools.judged, **self._costing()}
        inputs |= {"validation": job.teaching.validation_batches}
        return self.stages.run("verify", inputs, make)

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
            goal = self.text(long)
            taught: Objective
            if told is not None:
                taught = DistillAnswers(goal, Answers(told / "answers"), share=teaching.share)
                self.teacher.let_go()
            else:
                how = {"share": teaching.share, "temperature": teaching.temperature, "name": self.teacher.identity}
                taught = Distill(goal, self.teacher.taught(), streams=self._streams(one), **how)
            self.train(
                folder,
                lambda: student(start, teaching.precision, self.teacher.device),
                Later(taught, first),  # type: ignore[arg-type]
                one.plan.config.d_model,
                steps,
                name=start.name,
            )

        inputs = {
            **self.base,
            **self.reading(long),
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

    def train(
        self, folder: Path, start: Callable[[], Hybrid], goal: Objective, d_model: int, steps: int, *, name: str
    ) -> None:
        """Train a student of this width, as `distil` does, by the job's settings."""
        teaching = self.job.teaching
        config = TrainConfig(
            steps=steps,
            optim=teaching.optim,
            schedule=teaching.schedule(d_model, steps),
            save_minutes=teaching.save_minutes,
            save_every=teaching.save_every,
            keep=1,
            compile="off" if self.teacher.device == "cpu" else "auto",
        )
        watchers = self.tools.observe(steps)
        distil(
            folder, start, goal, config, name=name, seed=self.job.seed, tokenizer=self.tokenizer(), observers=watchers
        )

    def text(self, long: Long | None = None) -> NextToken:
        """Next tokens of the text, as every student reads them."""
        rows = self.job.teaching.rows if long is None else long.rows
        # longer rows are cut from other places
        seed = self.job.seed + (long is not None)
        return self.data.objective(rows, seed=seed, validation_batches=self.job.teaching.validation_batches)

    def reading(self, long: Long | None = None) -> dict[str, object]:
        """What decides how students read and learn, for a stage's inputs."""
        teaching = self.job.teaching
        return {
            "data": self.data.identity(),
            "rows": to_dict(teaching.rows if long is None else long.rows),
            "precision": teaching.precision,
            "optim": to_dict(teaching.optim),
            "validation": teaching.validation_batches,
        }

    def _costing(self) -> dict[str, object]:
        job, clock = self.job, self.costs.clock
        # a machine without a name of its own is what its limits are, wherever they are written
        machine = clock.machine if isinstance(clock, Roofline) and job.device not in MACHINES else None
        return {
            "load": to_dict(job.load),
            "numbers": to_dict(job.numbers),
            "device": job.device if machine is None else asdict(machine),
            "reserve": job.reserve,
        }

    def _batches(self, n: int, first: int = 0) -> list[Batch]:
        """Calibration text: of the training part, in another order than that of the distillation, each batch once.

        Scores read the first batches, rankings those behind them. What validates is left for choosing and reporting.
        """
        loader = self.data.loader(self.job.teaching.rows, seed=self.job.seed + 2)
        return [loader.batch(first + i) for i in range(n)]

    def scores(self) -> Scores:
        """Importance of the teacher's parts."""
        return Scores.load(self.score() / SCORES)

    def scores_of(self, one: Named) -> Scores:
        """Importance by which a plan is cut."""
        return self.scores() if one.scores is None else Scores.load(self.searched() / one.scores)

    def _streams(self, one: Named) -> Streams | None:
        weight = self.job.teaching.streams
        if not weight:
            return None
        narrow = one.plan.config.d_model < self.config.d_model
        channels = kept_channels(one.plan, self.scores_of(one)) if narrow else None
        return streams_of(one.plan, len(self.config.layers), channels, weight)

    def tokenizer(self) -> Path | None:
        """The teacher's folder, if it has one."""
        return self.origin if (self.origin / "tokenizer.json").is_file() else None
