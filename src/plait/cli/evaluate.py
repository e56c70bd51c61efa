"""`plait evaluate`: scores of a checkpoint on evaluation sets, each above chance, with standard errors."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from plait.cli.drawing import Drawn, render
from plait.cli.launch import arg
from plait.engine.likelihood import BATCH_TOKENS
from plait.evals.suite import DEFAULT, Suite, mean_of, task_of
from plait.evals.tasks import TASKS
from plait.formats.checkpoint import Checkpoint
from plait.report import Report
from plait.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
EXAMPLE = """plait evaluate path/to/checkpoint --data path/to/eval
  plait evaluate path/to/checkpoint --tasks blimp,piqa --data path/to/eval --limit 500 --json"""
# seconds between two lines of progress
EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which model, on what."""

    checkpoint: Path = arg(help="folder of the model", positional=True)
    data: Path = arg(help="folder of evaluation data: a .jsonl file per task, also .zst or .gz")
    tasks: tuple[str, ...] = arg(default=DEFAULT, help=f"of {', '.join(TASKS)}")
    limit: int = arg(default=0, help="examples of each task, 0 for all")
    seed: int = arg(default=0, help="which examples, with --limit")
    tokenizer: Path | None = arg(default=None, help="tokenizer.json or its folder; the checkpoint's own if not given")
    dtype: Literal["auto", "bfloat16", "float32"] = arg(default="auto", help="of the weights; auto is as stored")
    recipe: str | None = arg(default=None, help="number format, such as int8 or int4; the model's own if not given")
    device: str = arg(default="auto", help="cpu, cuda, cuda:1 ...; auto is the GPU if there is one")
    batch_tokens: int = arg(default=BATCH_TOKENS, help="tokens per pass; bounds memory")

    def __post_init__(self) -> None:
        for name in self.tasks:
            task_of(name)
        for field, least in (("limit", 0), ("batch_tokens", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")


def run(inputs: Inputs) -> Report:
    """Read the tasks, load the model, score it."""
    opened = Checkpoint.open(inputs.checkpoint)
    suite = Suite.open(inputs.data, inputs.tasks, _tokenizer(inputs), limit=inputs.limit, seed=inputs.seed)
    suite.check(opened.config)
    if 2 * suite.vocab_size < opened.config.vocab_size:
        log.warning(
            "the tokenizer has %s ids, the model %s: is it the model's own?", suite.vocab_size, opened.config.vocab_size
        )
    model = opened.model(device=inputs.device, dtype=inputs.dtype, recipe=inputs.recipe)
    report = Drawn(f"evaluate {opened.config.name or inputs.checkpoint.resolve().name}")
    began = time.perf_counter()
    scores = suite.scores(model.eval(), batch_tokens=inputs.batch_tokens, progress=_progress())
    took = time.perf_counter() - began
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "examples", "accuracy", "chance", "above chance", "", "what"):
        table.add_column(heading, justify="left" if heading in ("task", "what", "") else "right")
    for score in scores:
        report.add(f"{score.name} accuracy", score.accuracy, "", n=score.n, spread=score.accuracy_error)
        report.add(f"{score.name} above chance", score.value, "", n=score.n, spread=score.error)
        shown = (f"{score.accuracy:.2%}", f"{score.chance:.0%}", f"{score.value:.2%}", f"± {score.error:.2%}")
        table.add_row(score.name, f"{score.n:,}", *shown, Text(TASKS[score.name].summary, "dim"))
    mean = mean_of(scores)
    report.add(mean.name, mean.value, "", n=mean.n, spread=mean.error)
    table.add_row(Text("mean", "bold"), f"{mean.n:,}", "", "", f"{mean.value:.2%}", f"± {mean.error:.2%}")
    report.add("time", took, "s")
    report.drawing = render(Text(report.title, "bold"), "", table)
    return report


def _tokenizer(inputs: Inputs) -> Tokenizer:
    where = inputs.tokenizer or inputs.checkpoint
    if inputs.tokenizer is None and not (inputs.checkpoint / "tokenizer.json").is_file():
        raise ValueError(
            f"{inputs.checkpoint} has no tokenizer.json, so that text cannot be turned into token ids; "
            "put the model's tokenizer.json there, or give it: --tokenizer PATH"
        )
    return Tokenizer.open(where)


def _progress() -> Callable[[str, int, int], None]:
    last = time.perf_counter()

    def note(task: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= EVERY_S:
            last = now
            log.info("%s: %s of %s questions", task, f"{done:,}", f"{total:,}")

    return note
