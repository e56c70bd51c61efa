"""What the teacher, the student and the baselines are worth and what they cost, measured side by side.

    loss         mean cross-entropy of the next token on held-out text, nats
    accuracy     how often the likeliest token is the one that comes
    agreement    how often it is the teacher's likeliest
    scores       of tasks, by name, as a judge from outside gives them

Speed is that of random weights in the numbers of the budget, under its load, all models in turns: prompts are read as
the engine reads them, and a step begins in the middle of the answers. Contexts that would take long are shortened, and
the report says so.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from plait.compress.costs import Costs, Load
from plait.compress.distill import MODEL
from plait.compress.job import Job
from plait.compress.numbers import CODES
from plait.compress.plan import Plan
from plait.compress.stopwatch import in_turns, prompts, ready, steps
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.formats.checkpoint import load
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.train.metrics import write_whole

# task -> score; of the teacher and the students alike
Judge = Callable[[Hybrid], Mapping[str, float]]
FILE, TEACHER = "verify.json", "teacher"
# positions whose logits exist at a time
ROWS = 1024
# of one prompt of the teacher, at most
LONGEST_S, ROUNDS = 20.0, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """name: in the report. folder: of a stage with a model. plan: what it was cut to."""

    name: str
    folder: Path
    plan: Plan


@torch.no_grad()
def guesses(model: Hybrid, batches: Sequence[Batch]) -> tuple[Tensor, float]:
    """The likeliest token at every counted position, and the mean loss there.

    Args:
        model: in evaluation.
        batches: what it reads.

    Returns: (counted tokens,) int64 on the CPU; nats.
    Raises: ValueError if no token is counted.
    """
    found: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        counted = (batch.targets != IGNORED).flatten()
        batch = batch.to(model.device)
        x = model.hidden(batch.ids, starts=batch.starts)[0]
        total += model.loss_sum(x, batch.targets).double().cpu()
        weight = model.head_weight.to(x.dtype)
        rows = x.flatten(0, 1)[counted.to(x.device)]
        found += [(part @ weight.T).argmax(-1).cpu() for part in rows.split(ROWS)]
    tokens = sum(len(part) for part in found)
    if not tokens:
        raise ValueError("the held-out batches count no token; give a larger validation set")
    return torch.cat(found), float(total) / tokens


def verify(
    folder: Path,
    teacher: Hybrid,
    subjects: Sequence[Subject],
    *,
    job: Job,
    costs: Costs,
    batches: Sequence[Batch],
    judge: Judge | None,
    say: Callable[[str], None],
) -> None:
    """Write verify.json: one table per model, the teacher first, and under which load speeds were measured.

    Args:
        folder: to fill; models that are looked at already are not looked at again.
        teacher: in evaluation.
        subjects: the others.
        job, costs: the budget's.
        batches: held-out text.
        judge: gives task scores; None for none.
        say: told what goes on.
    """
    truth = torch.cat([batch.targets[batch.targets != IGNORED] for batch in batches])
    compute = str(recipe_of(job.teaching.precision).compute).removeprefix("torch.")
    mine, quality = _quality(folder, TEACHER, lambda: teacher, batches, truth, None, judge, say)
    found = {TEACHER: quality}
    for one in subjects:

        def model(path: Path = one.folder / MODEL) -> Hybrid:
            return load(path, device=teacher.device, dtype=compute).eval()

        found[one.name] = _quality(folder, one.name, model, batches, truth, mine, judge, say)[1]
    configs = {TEACHER: teacher.config} | {one.name: one.plan.config for one in subjects}
    load_, speeds = _speeds(folder, configs, job, teacher.device, say)
    rows = []
    for name, config in configs.items():
        total = costs.total(config)
        rows.append(
            {
                "name": name,
                "config": config.to_dict(),
                "pattern": config.pattern,
                "costs": asdict(total) | {"total_bytes": total.total_bytes},
                "measured": speeds.get(name),
                **found[name],
            }
        )
    facts = {"models": rows, "load": asdict(job.load), "measured_load": None if load_ is None else asdict(load_)}
    write_whole(folder / FILE, json.dumps(facts, indent=1) + "\n")


def _quality(
    folder: Path,
    name: str,
    model: Callable[[], Hybrid],
    batches: Sequence[Batch],
    truth: Tensor,
    teacher: Tensor | None,
    judge: Judge | None,
    say: Callable[[str], None],
) -> tuple[Tensor, dict[str, object]]:
    """The model's guesses, for the teacher only, and what it is worth; kept in a file of its own."""
    path = folder / f"quality-{name}.json"
    if path.is_file() and teacher is not None:
        return truth, json.loads(path.read_text(encoding="utf-8"))
    say(f"looking at {name}")
    one = model()
    guessed, loss = guesses(one, batches)
    against = guessed if teacher is None else teacher
    facts: dict[str, object] = {
        "validation_loss": loss,
        "accuracy": float((guessed == truth).double().mean()),
        "agreement": float((guessed == against).double().mean()),
        "scores": {} if judge is None else dict(judge(one)),
    }
    write_whole(path, json.dumps(facts, indent=1) + "\n")
    return guessed, facts


def _speeds(
    folder: Path, configs: Mapping[str, ModelConfig], job: Job, device: torch.device, say: Callable[[str], None]
) -> tuple[Load | None, dict[str, dict[str, float]]]:
    """Seconds of prompts and of a step of each model, in turns, and under which load; none for unknown numbers."""
    weights = job.numbers.weights
    if weights not in ("bf16", "fp32", *CODES):
        say(f"no speed is measured: this machine computes nothing in {weights} weights")
        return None, {}
    path = folder / "speed.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Load(**kept["load"]), kept["speeds"]
    models = {name: ready(config, weights, device) for name, config in configs.items()}
    load = affordable(models[TEACHER], job.load)
    if load != job.load:
        say(f"speeds are measured at {load.context:,} tokens of context: {job.load.context:,} would take long here")
    say("measuring speeds")
    reading = in_turns([prompts(model, load) for model in models.values()], 2)
    writing = in_turns([steps(model, load, rounds=ROUNDS) for model in models.values()], ROUNDS)
    speeds = {
        name: {"prefill_s": min(read), "decode_s": statistics.median(write)}
        for name, read, write in zip(models, reading, writing, strict=True)
    }
    write_whole(path, json.dumps({"load": asdict(load), "speeds": speeds}, indent=1) + "\n")
    return load, speeds


def affordable(model: Hybrid, load: Load) -> Load:
    """The load with a context that is halved until a prompt of it takes little time here."""
    short = replace(load, context=min(load.context, 2048), batch=1)
    (seconds,) = in_turns([prompts(model, short)], 1)
    pace = seconds[0] / short.context * load.batch
    context = load.context
    while context > short.context and pace * context > LONGEST_S:
        context //= 2
    return replace(load, context=context)
