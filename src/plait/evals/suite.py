"""Several tasks at once: their examples as token ids, the scores of a model, and one number above chance.

    accuracy a = mean of grades;   standard error = sqrt(a (1 - a) / (n - 1))
    above chance = (a - chance) / (1 - chance);   the score is its mean over the tasks

A score of 0 is guessing and 1 is perfect, whatever the tasks. Read once, a suite scores any number of models that share
its tokenizer.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plait.config import nearest
from plait.engine.likelihood import BATCH_TOKENS, Likelihood, Question, likelihoods
from plait.evals.task import Example, Option, Task
from plait.evals.tasks import TASKS
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid

DEFAULT = ("blimp", "lambada", "arc_easy", "piqa")


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    vocab_size: int

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Text to ids, perhaps with the tokenizer's own special tokens around."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one task, or of the mean over several; n: examples.

    accuracy, accuracy_error, chance: of a task, 0 for a mean. value, error: above chance. Errors are standard errors.
    """

    name: str
    n: int
    accuracy: float = 0.0
    accuracy_error: float = 0.0
    chance: float = 0.0
    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Tasks with their examples, and the examples' questions as token ids of one tokenizer."""

    tasks: tuple[Task, ...]
    examples: tuple[tuple[Example, ...], ...]
    questions: tuple[tuple[Question, ...], ...]
    vocab_size: int

    @classmethod
    def open(cls, folder: Path, names: Sequence[str], tokenizer: Encoder, *, limit: int = 0, seed: int = 0) -> "Suite":
        """Read tasks from a folder of evaluation data.

        Args:
            folder: holds a .jsonl file (also .zst, .gz) per task.
            names: of TASKS.
            tokenizer: the models' own.
            limit: examples of each task, 0 for all. seed: which ones.

        Raises: ValueError for an unknown task, naming the nearest, or one given twice; for a missing folder, file or
            field.
        """
        tasks = tuple(map(task_of, names))
        if not tasks or len(set(names)) < len(names):
            raise ValueError(f"tasks: give at least one of {', '.join(TASKS)}, each once")
        examples = tuple(tuple(task.examples(folder, limit, seed)) for task in tasks)
        # a tokenizer that opens a text with a token of its own is followed; else a line end comes before a text's
        # beginning, so that its first word is scored as well
        special = _special(tokenizer)
        opening = special or tokenizer.encode("\n")
        questions = tuple(
            tuple(_question(option, tokenizer, special, opening) for example in several for option in example.options)
            for several in examples
        )
        return cls(tasks=tasks, examples=examples, questions=questions, vocab_size=tokenizer.vocab_size)

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that cannot have this tokenizer.

        Raises: ValueError if the tokenizer knows more ids than the model.
        """
        if self.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} ids, the model's embedding only {config.vocab_size} rows; "
                "this is not the model's own tokenizer"
            )

    def scores(
        self,
        model: Hybrid,
        *,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Score]:
        """Score a model on each task.

        Args:
            model: whose vocabulary the questions are in.
            batch_tokens: of one pass of the model.
            progress: called with a task's name, questions answered and questions in all.

        Raises: as `check`.
        """
        self.check(model.config)
        found = []
        for task, examples, questions in zip(self.tasks, self.examples, self.questions, strict=True):
            done = 0

            def note(n: int, task: Task = task, total: int = len(questions)) -> None:
                nonlocal done
                done += n
                if progress is not None:
                    progress(task.name, done, total)

            answers = iter(likelihoods(model, questions, batch_tokens=batch_tokens, progress=note))
            found.append(_score(task, examples, [[next(answers) for _ in example.options] for example in examples]))
        return found


def task_of(name: str) -> Task:
    """A task by name.

    Raises: ValueError naming the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    near = nearest(name, TASKS)
    raise ValueError(
        f"task {name!r} is unknown; " + (f"did you mean {near}?" if near else f"known: {', '.join(TASKS)}")
    )


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean score above chance over tasks, each counting alike, with its standard error."""
    error = math.sqrt(sum(s.error**2 for s in scores)) / len(scores)
    value = statistics.fmean(s.value for s in scores)
    return Score(name="mean above chance", n=sum(s.n for s in scores), value=value, error=error)


def judge(suite: Suite) -> Callable[[Hybrid], dict[str, float]]:
    """A function from a model to its scores above chance by task, and their "mean"."""

    def scores(model: Hybrid) -> dict[str, float]:
        found = suite.scores(model)
        return {s.name: s.value for s in found} | {"mean": mean_of(found).value}

    return scores


def _score(task: Task, examples: Sequence[Example], answers: Sequence[Sequence[Likelihood]]) -> Score:
    grades = [task.grade(example, found).score for example, found in zip(examples, answers, strict=True)]
    accuracy, n = statistics.fmean(grades), len(grades)
    error = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else math.nan
    room = 1 - task.chance
    return Score(
        name=task.name,
        n=n,
        accuracy=accuracy,
        accuracy_error=error,
        chance=task.chance,
        value=(accuracy - task.chance) / room,
        error=error / room,
    )


def _question(option: Option, tokenizer: Encoder, special: list[int], opening: list[int]) -> Question:
    """Token ids of an option: the continuation's are those by which the whole is longer than the context alone."""
    if not option.context:
        return Question(context=tuple(opening), continuation=tuple(tokenizer.encode(option.continuation)))
    whole = tokenizer.encode(option.context + option.continuation)
    # where the context's last letters and the continuation make one token, that one is scored
    n = min(len(tokenizer.encode(option.context)), len(whole) - 1)
    return Question(context=(*special, *whole[:n]) or tuple(opening), continuation=tuple(whole[n:]))


def _special(tokenizer: Encoder) -> list[int]:
    """The ids that a tokenizer puts before a text; what it may put behind one ends it, and is not wanted."""
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    before = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[: next(before, 0)]
