"""`plait generate`: continue prompts from the command line, a file or standard input, and say how fast it went."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from plait.cli.launch import arg
from plait.engine.conversation import end_of_turn
from plait.engine.engine import Engine, Prompt
from plait.engine.request import Completion, Sampling
from plait.formats.checkpoint import load
from plait.report import Report
from plait.text.chat import encode_chat

EXAMPLE = """plait generate path/to/checkpoint "def fibonacci(n):" --max-tokens 64 --temperature 0
  echo "Why is the sky blue?" | plait generate path/to/checkpoint --chat
  plait generate path/to/checkpoint --prompts-file prompts.jsonl --json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which model continues what, and how."""

    checkpoint: Path = arg(help="folder of the model", positional=True)
    prompt: str | None = arg(default=None, help="text to continue; standard input if not given", positional=True)
    prompt_file: Path | None = arg(default=None, help="file whose whole text is the prompt")
    prompts_file: Path | None = arg(
        default=None, help='file of prompts: one a line, or .jsonl with {"prompt": ...} lines'
    )
    ids: tuple[int, ...] = arg(default=(), help="the prompt as token ids; needs no tokenizer")
    chat: bool = arg(default=False, help="put each prompt into the model's chat template, as a user's turn")
    max_tokens: int = arg(default=128, help="at most so many new tokens")
    temperature: float = arg(default=1.0, help="0 takes the likeliest token, 1 the model's own distribution")
    top_k: int | None = arg(default=None, help="only the k likeliest tokens")
    top_p: float | None = arg(default=None, help="only the likeliest tokens that together hold this probability")
    min_p: float | None = arg(default=None, help="only tokens at least this fraction as likely as the likeliest")
    repetition_penalty: float = arg(default=1.0, help="above 1 makes tokens seen before less likely")
    seed: int | None = arg(default=None, help="the same seed gives the same text")
    stop: tuple[str, ...] = arg(default=(), help=r"texts that end the answer; \n is a line end, \t a tab")
    stop_ids: tuple[int, ...] = arg(default=(), help="token ids that end the answer")
    ignore_eos: bool = arg(default=False, help="run on past the model's own end")
    stream: bool | None = arg(default=None, help="show text as it comes; by default on a terminal only")
    dtype: Literal["auto", "bfloat16", "float32"] = arg(default="auto", help="of the weights; auto is as stored")
    recipe: str | None = arg(default=None, help="number format, such as int8 or int4; the model's own if not given")
    device: str = arg(default="auto", help="cpu, cuda, cuda:1 ...; auto is the GPU if there is one")
    max_batch: int = arg(default=64, help="prompts that run together")
    prefill_chunk: int = arg(default=2048, help="tokens of prompts per pass; bounds memory")

    def __post_init__(self) -> None:
        given = {"prompt": self.prompt, "--prompt-file": self.prompt_file, "--prompts-file": self.prompts_file}
        named = [name for name, value in given.items() if value is not None] + (["--ids"] if self.ids else [])
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: give the prompt in one way only")
        if self.chat and self.ids:
            raise ValueError("--chat and --ids: ids are taken as they are; leave one out")
        sampling(self)


@dataclass(slots=True)
class Answers(Report):
    """The report, with the completions themselves where it is read by a program."""

    completions: list[Completion] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The facts, and one entry per prompt."""
        # slots make a new class, which the short form of super() does not know
        return Report.to_dict(self) | {"completions": [_entry(c) for c in self.completions]}


def sampling(inputs: Inputs) -> Sampling:
    """The settings that the options ask for.

    Raises: ValueError naming the option that makes no sense.
    """
    return Sampling(
        max_tokens=inputs.max_tokens,
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        min_p=inputs.min_p,
        repetition_penalty=inputs.repetition_penalty,
        seed=inputs.seed,
        stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in inputs.stop),
        stop_ids=inputs.stop_ids,
        ignore_eos=inputs.ignore_eos,
    )


def run(inputs: Inputs) -> Report:
    """Load the model, continue every prompt, print the texts, report the speed."""
    prompts = read_prompts(inputs)
    began = time.perf_counter()
    model = load(inputs.checkpoint, device=inputs.device, dtype=inputs.dtype, recipe=inputs.recipe)
    engine = Engine(model, max_batch=inputs.max_batch, prefill_chunk=inputs.prefill_chunk)
    load_s = time.perf_counter() - began
    settings = sampling(inputs)
    if engine.tokenizer is None and not inputs.ids:
        raise ValueError(
            f"{inputs.checkpoint} has no tokenizer.json, so that text cannot be turned into token ids; "
            "put the model's tokenizer.json there, or give the ids: --ids 1,2,3"
        )
    if inputs.chat and engine.tokenizer is not None:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [encode_chat(engine.tokenizer, turn) for turn in turns]
        ids, texts = end_of_turn(engine.tokenizer)
        settings = replace(settings, stop=(*settings.stop, *texts), stop_ids=(*settings.stop_ids, *ids))
    streams = sys.stdout.isatty() if inputs.stream is None else inputs.stream
    began = time.perf_counter()
    if streams and len(prompts) == 1 and engine.tokenizer is not None:
        completions = [_show_stream(engine, prompts[0], settings)]
    else:
        completions = list(_show(engine, prompts, settings))
    return _report(inputs.checkpoint, completions, load_s, time.perf_counter() - began)


def read_prompts(inputs: Inputs) -> Sequence[Prompt]:
    """The prompts, from wherever they come.

    Raises: ValueError naming the file and line that is no prompt; OSError.
    """
    if inputs.ids:
        return [list(inputs.ids)]
    if inputs.prompt is not None:
        return [inputs.prompt]
    if inputs.prompt_file is not None:
        return [_text(inputs.prompt_file)]
    if inputs.prompts_file is not None:
        lines = [line for line in _text(inputs.prompts_file).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{inputs.prompts_file} holds no prompt; write one a line")
        if inputs.prompts_file.suffix in (".jsonl", ".json"):
            return [_prompt_of(line, f"{inputs.prompts_file}, prompt {i}") for i, line in enumerate(lines, 1)]
        return list(lines)
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt; give one in quotes, or --prompt-file, --prompts-file, --ids, or a pipe")
    # the line end that echo adds is not part of what was meant
    return [sys.stdin.read().removesuffix("\n")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); is this the right file?") from None


def _prompt_of(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt):
        return prompt
    raise ValueError(f'{where} is no prompt; write {{"prompt": "text"}} or {{"prompt": [1, 2, 3]}}')


def _show_stream(engine: Engine, prompt: Prompt, settings: Sampling) -> Completion:
    stream = engine.stream(prompt, settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print("\n", flush=True)
    return stream.completion


def _show(engine: Engine, prompts: Sequence[Prompt], settings: Sampling) -> list[Completion]:
    completions = []
    for i, completion in enumerate(engine.generate(prompts, settings), 1):
        if len(prompts) > 1:
            print(f"[{i}/{len(prompts)}]")
        print(completion.text if engine.tokenizer else " ".join(map(str, completion.token_ids)), flush=True)
        completions.append(completion)
    return completions


def _report(checkpoint: Path, completions: list[Completion], load_s: float, total_s: float) -> Answers:
    report = Answers(f"generate {checkpoint}", completions=completions)
    usages = [c.usage for c in completions]
    n_prompt, n_new = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    report.add("prompt tokens", n_prompt, "tokens")
    report.add("generated tokens", n_new, "tokens")
    if len(completions) == 1:
        timings = completions[0].timings
        report.add("finish reason", str(completions[0].finish_reason))
        report.add("prefill speed", n_prompt / max(timings.prefill_s, 1e-9), "tokens/s")
        report.add("decode speed", completions[0].decode_tokens_per_s, "tokens/s")
    else:
        report.add("prompts", len(completions))
        report.add("overall speed", n_new / max(total_s, 1e-9), "generated tokens/s")
    report.add("largest cache of a sequence", max(u.cache_bytes for u in usages), "bytes")
    report.add("loading", load_s, "s")
    return report


def _entry(c: Completion) -> dict[str, object]:
    return {
        "text": c.text,
        "token_ids": c.token_ids,
        "finish_reason": str(c.finish_reason),
        "prompt_tokens": c.usage.prompt_tokens,
        "completion_tokens": c.usage.completion_tokens,
        "prefill_s": c.timings.prefill_s,
        "decode_s": c.timings.decode_s,
    }
