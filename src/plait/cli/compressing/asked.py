"""From the words of `plait compress` to a job: the budget, the load, the machine, and settings on top of defaults."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from plait.cli.info import tokens_of
from plait.cli.launch import arg
from plait.cli.machine import speed
from plait.cli.plan import PROFILE, THIS, machine_of
from plait.compress.blocks import read_bytes
from plait.compress.budget import Budget
from plait.compress.costs import Clock, Costs
from plait.compress.job import STAGES, Job
from plait.compress.library import BlockLibrary
from plait.compress.roofline import Roofline
from plait.compress.stages import check_names
from plait.config import ConfigError, bytes_of, load
from plait.evals.suite import DEFAULT
from plait.model.config import ModelConfig
from plait.model.layers import KINDS

EXPLAIN = "explain"

log = logging.getLogger(__name__)
# what a step of a usual student reads, over its teacher's
STUDENT = 0.8
COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which teacher, which budget, which text, and how much of it."""

    teacher: str = arg(help='folder of a checkpoint; or "explain" and the folder of a compression', positional=True)
    more: tuple[str, ...] = arg(default=(), help="settings, such as keep=5 or teaching.streams=0.5", positional=True)
    memory: str | None = arg(default=None, help="weights, keys, values and states together, such as 22GiB")
    weight_memory: str | None = arg(default=None, help="weights alone, such as 8GiB")
    params: str | None = arg(default=None, help="parameters, such as 4B")
    min_speedup: float | None = arg(default=None, help="times the teacher's speed of writing, such as 1.2")
    min_prefill_speedup: float | None = arg(default=None, help="times the teacher's speed of reading prompts")
    context: str | None = arg(default=None, help="tokens of each sequence, such as 128k (default: 8k)")
    batch: int | None = arg(default=None, help="sequences at once (default: 1)")
    answer: int | None = arg(default=None, help="tokens to write after each context (default: 0)")
    device: str | None = arg(
        default=None,
        help="which machine the speeds are of: this (measured; the default), a10g, h100, ..., or a file that "
        "plait bench device --save wrote there",
    )
    numbers: str | None = arg(default=None, help="what weights are held in when it runs: bf16, int8, int4, fp8, nvfp4")
    data: Path | None = arg(default=None, help="text to learn on: a folder of plait tokenize, or files of text")
    tokens: str | None = arg(default=None, help="tokens that the student learns from, such as 20M")
    method: Literal["minipuzzle", "puzzle"] | None = arg(
        default=None, help="one size for all layers of a kind (minipuzzle, the default), or a choice per layer (puzzle)"
    )
    elastic: tuple[float, ...] = arg(
        default=(), help="instead of a budget: one model for several sizes, as shares of the parameters: 0.8,0.6"
    )
    compare: bool = arg(default=False, help="with --elastic: also distil every size by itself, and say how far it is")
    precision: str | None = arg(default=None, help="what students are trained in; bf16 where it is fast, else fp32")
    eval_data: Path | None = arg(default=None, help="folder of evaluation data: judge the models by tasks too")
    tasks: tuple[str, ...] = arg(default=(), help=f"which tasks (default: {', '.join(DEFAULT)})")
    task_limit: int = arg(default=500, help="examples of each task, 0 for all")
    settings: Path | None = arg(default=None, help="file with all further settings, TOML or JSON")
    out: Path | None = arg(default=None, help="folder of the results (default: runs/NAME-compressed)")
    seed: int | None = arg(default=None, help="where randomness starts")
    again: tuple[str, ...] = arg(
        default=(), help=f"stages to make anew, with those that are made of them: {', '.join(STAGES)}"
    )
    until: str | None = arg(default=None, help="stage to stop after")
    dry_run: bool = arg(default=False, help="count candidates, tokens and hours; nothing is written")

    def __post_init__(self) -> None:
        check_names(self.again, STAGES, "again")
        check_names((self.until,) if self.until else (), STAGES, "until")
        if self.compare and not self.elastic:
            raise ValueError("compare belongs to --elastic 0.8,0.6")
        if not all(0 < share < 1 for share in self.elastic):
            raise ValueError(
                f"elastic={','.join(map(str, self.elastic))}: give shares between 0 and 1, such as 0.8,0.6"
            )
        if (self.batch is not None and self.batch < 1) or (self.answer or 0) < 0:
            raise ValueError(f"batch={self.batch}, answer={self.answer}: at least one sequence, and no negative answer")
        if self.teacher == EXPLAIN and len(self.more) != 1:
            raise ValueError("which compression? plait compress explain OUT")
        if self.teacher != EXPLAIN:
            for word in self.more:
                if "=" not in word:
                    raise ValueError(f"{word!r} is not understood; settings are given as key=value")
            if self.data is None:
                raise ValueError("which text? give --data FOLDER: one that plait tokenize wrote, or files of text")
            if self.device not in (None, THIS):
                machine_of(self.device)


def job_of(words: Inputs, overrides: Sequence[str]) -> Job:
    """The job: a file of settings, changed by `key=value` words, changed by the options.

    Raises: ConfigError for settings that do not fit, or a budget that limits nothing.
    """
    asked = list(overrides)
    given = {
        "budget.total_bytes": None if words.memory is None else bytes_of(words.memory),
        "budget.weight_bytes": None if words.weight_memory is None else bytes_of(words.weight_memory),
        "budget.params": None if words.params is None else count_of(words.params, "params"),
        "budget.min_speedup": words.min_speedup,
        "budget.min_prefill_speedup": words.min_prefill_speedup,
        "load.batch": words.batch,
        "load.context": None if words.context is None else tokens_of(words.context),
        "load.answer": words.answer,
        "teaching.tokens": None if words.tokens is None else count_of(words.tokens, "tokens"),
        "numbers.weights": words.numbers,
        "method": words.method,
        "teaching.precision": words.precision or (None if _says(words, asked, "teaching", "precision") else usual()),
        "seed": words.seed,
        "device": _device(words.device) if words.device else (None if _says(words, asked, "device") else THIS),
    }
    for name, value in given.items():
        if value is not None:
            asked.append(f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}")
    job = load(Job, words.settings, asked)
    if job.budget == Budget() and not words.elastic:
        raise ConfigError(
            "which budget? give at least one of --memory 22GiB, --params 4B, --weight-memory 8GiB, --min-speedup 1.2"
        )
    return job


def _device(name: str) -> str:
    return name if Path(name).suffix == PROFILE else name.lower()


class _Table(dict[str, object]):
    """Settings as they are written."""

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "_Table":
        return cls(data)


def _says(words: Inputs, asked: Sequence[str], *path: str) -> bool:
    """Whether the settings, without the options, say something of a key."""
    found: object = load(_Table, words.settings, asked)
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return False
        found = found[key]
    return True


def usual() -> str:
    """What students are trained in here: bfloat16 where it pays."""
    return "bf16" if speed(here()).has_fast_bf16 else "fp32"


def here() -> str:
    """Where models run: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _measuring(block: str) -> None:
    facts = json.loads(block)
    kind = KINDS[facts["kind"]].name if facts["kind"] in KINDS else "all but the layers"
    sizes = ", ".join(f"{name} {facts[name]}" for name in ("n_heads", "d_ff", "n_experts", "d_state") if name in facts)
    log.info("measuring %s of width %s%s", kind, facts["d_model"], f", {sizes}" if sizes else "")


def costs_of(job: Job, teacher: ModelConfig, blocks: Path) -> Costs:
    """What students of a teacher cost under the job's load, by its clock; `blocks` keeps measurements of this machine.

    Raises: ValueError for an unknown machine.
    """
    clock: Clock | None
    if job.device == THIS:
        # a small model's weights stay in the processor's caches from step to step
        footprint = STUDENT * read_bytes(teacher, job.load, job.numbers.weights)
        how = {"interpolates": True, "footprint": footprint}
        clock = BlockLibrary(path=blocks, device=here(), on_measure=_measuring, **how)  # type: ignore[arg-type]
    else:
        machine = machine_of(job.device)
        clock = None if machine.flops is None else Roofline(machine=machine)
    return Costs(load=job.load, numbers=job.numbers, clock=clock, reserve=job.reserve)


def count_of(text: str, field: str) -> int:
    """Read a number of things: 20M, 1.5B, 300000; letters are powers of 1000.

    Raises: ConfigError saying how to write it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower().replace("_", ""))
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{field}={text!r}: write a number, such as 20M or 300000")
    return round(float(found[1]) * COUNT[found[2]])
