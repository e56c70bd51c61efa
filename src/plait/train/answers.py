"""A teacher's answers to batches, kept on a disk: its k likeliest next tokens and the mass of all others together.

    FOLDER/answers.json         which teacher, which batches (their objective's identity), k, temperature, draws
    FOLDER/draws-000000/        the answers to some draws: parts of micro-batches as safetensors, with checksums

Written once, the answers teach any number of students without the teacher in memory. A part is filled aside and
renamed; parts that are there are not made again, so writing goes on where it was stopped. Of the tail one number is
kept, and ops/distill_top.py says what it means.

Numbers  ids in 2 bytes for a vocabulary up to 65,536, else 4; log-probabilities in float16 (three digits of each
         logarithm): 4 k + 2 bytes per token, or 6 k + 2.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from plait.data.loader import Batch
from plait.dist import state
from plait.formats.folder import whole_folder
from plait.model.hybrid import Hybrid
from plait.train.metrics import write_whole
from plait.train.objective import Objective

FILE = "answers.json"
# draws in one part
PART = 16
# positions whose whole distribution exists at a time
ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To one micro-batch. ids, log_p: (B, L, K) of the likeliest tokens. log_rest: (B, L) of all others together."""

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor

    def to(self, device: torch.device | str) -> "Answer":
        """The same on another device."""
        return Answer(ids=self.ids.to(device), log_p=self.log_p.to(device), log_rest=self.log_rest.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A micro-batch and the teacher's answer to it."""

    batch: Batch
    answer: Answer


def write_answers(
    folder: Path,
    objective: Objective[Batch],
    teacher: Hybrid,
    *,
    draws: int,
    k: int = 64,
    temperature: float = 1.0,
    name: str = "teacher",
    on_draw: Callable[[int], None] | None = None,
) -> "Answers":
    """Ask a teacher about the draws 0 .. draws - 1 of an objective, or go on doing so.

    Args:
        folder: to fill; one with other answers is refused.
        objective: whose batches.
        teacher: on its device; any precision will do.
        draws: steps of the training to come.
        k: likeliest tokens to keep of each answer.
        temperature: the teacher's logits are divided by it.
        name: which teacher it is.
        on_draw: told how many draws are done, parts found ready included.

    Returns: the answers, open.
    Raises: ValueError for numbers that do not fit, or a folder with answers of another teacher or to other batches.
    """
    k = min(k, teacher.config.vocab_size)
    if k < 1 or draws < 1:
        raise ValueError(f"k={k}, draws={draws}: keep at least one token of the answers to at least one draw")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be above 0; 1 takes the teacher as it is")
    facts = {"teacher": name, "k": k, "temperature": temperature, "data": _plain(objective.identity()), "part": PART}
    facts["vocab_size"] = teacher.config.vocab_size
    if (folder / FILE).is_file():
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for key, value in facts.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{folder} keeps other answers: {key} was {before.get(key)!r} and is {value!r}; "
                    "choose another folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps(facts | {"draws": draws}, indent=1) + "\n")
    for first in range(0, draws, PART):
        last = min(first + PART, draws)
        if not _holds(folder, first, last):
            tensors: dict[str, Tensor] = {}
            for draw in range(first, last):
                for number, batch in enumerate(objective.batches(draw)):
                    answer = ask(teacher, batch, k=k, temperature=temperature)
                    for field in ("ids", "log_p", "log_rest"):
                        tensors[f"{draw}.{number}.{field}"] = getattr(answer, field)
            with whole_folder(_part(folder, first), overwrite=True, replaces=lambda _: True) as aside:
                state.write(aside, {"answers": tensors}, {"first": first, "last": last})
        if on_draw is not None:
            on_draw(last)
    return Answers(folder)


@torch.no_grad()
def ask(teacher: Hybrid, batch: Batch, *, k: int, temperature: float = 1.0) -> Answer:
    """A teacher's answer to one micro-batch, on the CPU; arguments are those of `write_answers`."""
    batch = batch.to(teacher.device)
    x = teacher.hidden(batch.ids, starts=batch.starts)[0].flatten(0, 1)
    weight = teacher.head_weight.to(x.dtype)
    small = torch.uint16 if teacher.config.vocab_size <= 1 << 16 else torch.int32
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in x.split(ROWS):
        log_p = ((rows @ weight.T).float() / temperature).log_softmax(-1)
        top, ids = log_p.topk(k, -1)
        rest = log_p.scatter_(1, ids, -torch.inf).logsumexp(-1)
        found.append((ids.to(small), top.half(), rest.half()))
    ids, top, rest = (torch.cat(parts).cpu().unflatten(0, batch.ids.shape) for parts in zip(*found, strict=True))
    return Answer(ids=ids, log_p=top, log_rest=rest)


class Answers:
    """Answers on a disk, read part by part."""

    def __init__(self, folder: Path) -> None:
        """Raises: ValueError naming the file if the folder holds no answers, or not all of them."""
        self.folder = folder
        try:
            facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
            self.teacher, self.temperature = str(facts["teacher"]), float(facts["temperature"])
            self.k, self.draws, self.data = int(facts["k"]), int(facts["draws"]), facts["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / FILE} tells of no answers of a teacher: {error}") from None
        missing = [a for a in range(0, self.draws, PART) if not _holds(folder, a, min(a + PART, self.draws))]
        if missing:
            raise ValueError(f"{_part(folder, missing[0])} is missing or incomplete; write the answers again")
        # batches are asked for in order, by one thread
        self._read = lru_cache(maxsize=2)(self._part)

    def check(self, objective: Objective[Batch]) -> None:
        """Refuse an objective that draws other batches.

        Raises: ValueError naming the difference.
        """
        ours = _plain(objective.identity())
        assert isinstance(ours, dict)
        for key in sorted({*ours, *self.data}):
            if ours.get(key) != self.data.get(key):
                raise ValueError(
                    f"{self.folder} answers other batches: {key} was {self.data.get(key)!r} and is {ours.get(key)!r}; "
                    "write answers to these"
                )

    def of(self, draw: int) -> list[Answer]:
        """To the micro-batches of one draw."""
        tensors = self._read(draw - draw % PART)
        found: list[Answer] = []
        while f"{draw}.{len(found)}.ids" in tensors:
            at = f"{draw}.{len(found)}."
            # few operations know unsigned numbers of two bytes
            ids = tensors[at + "ids"].to(torch.int32)
            found.append(Answer(ids=ids, log_p=tensors[at + "log_p"], log_rest=tensors[at + "log_rest"]))
        return found

    def _part(self, first: int) -> dict[str, Tensor]:
        return state.read(_part(self.folder, first))[0]["answers"]


def _part(folder: Path, first: int) -> Path:
    return folder / f"draws-{first:06}"


def _holds(folder: Path, first: int, last: int) -> bool:
    facts = state.facts(_part(folder, first))
    return facts is not None and facts.get("first") == first and int(str(facts.get("last", 0))) >= last


def _plain(data: object) -> object:
    # as it will be read back
    return json.loads(json.dumps(data))
