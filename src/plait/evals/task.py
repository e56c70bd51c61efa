"""A task: examples from a file, and how an answer is graded.

A likelihood task asks for no text. Each example has options, a continuation of a context each; the model says how
likely it finds each, and the grade is made from that.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.data.document import SourceError
from plait.data.sources.compressed import PACKED, open_bytes
from plait.engine.likelihood import Likelihood


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """context: text that is given, may be empty. continuation: text that is scored."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """options: at least one. gold: index of the right one. group: the kind of example, where a task has kinds."""

    options: tuple[Option, ...]
    gold: int = 0
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """score: from 0 to 1; the same number is a reward. reason: how it came about."""

    score: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """name: as users ask for it. file: its stem in a folder of evaluation data. chance: the score of guessing.

    example: a line of the file to an example; KeyError or ValueError for what is none. grade: from the likelihoods of
    its options, in order.
    """

    name: str
    file: str
    summary: str
    chance: float
    example: Callable[[Mapping[str, object]], Example]
    grade: Callable[[Example, Sequence[Likelihood]], Grade]

    def examples(self, folder: Path, limit: int = 0, seed: int = 0) -> list[Example]:
        """Read the task's examples.

        Args:
            folder: holds FILE.jsonl, also packed as .zst or .gz.
            limit: only so many, drawn over the whole file; 0 is all.
            seed: of the draw; the same seed draws the same examples.

        Raises: ValueError naming the folder, file or line that is missing or wrong.
        """
        path = self._path(folder)
        try:
            with open_bytes(path) as file:
                lines = [(n, line) for n, line in enumerate(file, 1) if line.strip()]
        except SourceError as error:
            raise ValueError(str(error)) from None
        if not lines:
            raise ValueError(f"{path} is empty; copy the file of {self.name} again")
        if 0 < limit < len(lines):
            lines = [lines[i] for i in sorted(random.Random(seed).sample(range(len(lines)), limit))]
        return [self._read(line, f"{path}, line {n}") for n, line in lines]

    def _path(self, folder: Path) -> Path:
        if not folder.is_dir():
            raise ValueError(f"data={str(folder)!r} is no folder; give the one with {self.file}.jsonl in it")
        for ending in ("", *PACKED):
            path = folder / f"{self.file}.jsonl{ending}"
            if path.is_file():
                return path
        there = sorted(p.name.partition(".")[0] for p in folder.glob("*.jsonl*"))
        seen = f"it has {', '.join(there[:12])}{' ...' * (len(there) > 12)}" if there else "it has no .jsonl files"
        raise ValueError(f"task {self.name!r} needs {self.file}.jsonl (or .zst, .gz) in {folder}; {seen}")

    def _read(self, line: bytes, where: str) -> Example:
        try:
            return self.example(json.loads(line))
        except KeyError as error:
            raise ValueError(f"{where} has no field {error}, which {self.name} needs") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is no example of {self.name}: {error}") from None


def text_of(row: Mapping[str, object], field: str) -> str:
    """A text field of a row; KeyError if it is not there, ValueError if it is no text."""
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is {value!r}, not a text")
    return value


def choice(row: Mapping[str, object], context: str, between: str) -> Example:
    """An example of several choices for one question.

    Args:
        row: has choices (texts) and gold (index).
        context: what comes before a choice. between: put between it and a choice, and scored with the choice.
    """
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"choices is {choices!r}, not a list of two texts or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}, not an index into {len(choices)} choices")
    return Example(options=tuple(Option(context=context, continuation=between + c) for c in choices), gold=gold)


def likeliest(example: Example, found: Sequence[Likelihood]) -> Grade:
    """1 if the right option has the largest log-probability, summed over its tokens; the first of equals is taken."""
    return _picked(example, [one.logprob for one in found])


def likeliest_per_byte(example: Example, found: Sequence[Likelihood]) -> Grade:
    """1 if the right option has the largest log-probability per byte of its text, so that long ones are no worse."""
    sizes = [len(option.continuation.strip().encode()) for option in example.options]
    return _picked(example, [one.logprob / size for one, size in zip(found, sizes, strict=True)])


def greedy(example: Example, found: Sequence[Likelihood]) -> Grade:
    """1 if each token of the only option is the model's first choice, as if it had written it itself."""
    return Grade(score=float(found[0].greedy), reason="as the model would write" if found[0].greedy else "other words")


def _picked(example: Example, scores: Sequence[float]) -> Grade:
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    return Grade(score=float(best == example.gold), reason=f"option {best} of {len(scores)}, {example.gold} is right")
