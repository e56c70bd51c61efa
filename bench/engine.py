"""Measure the engine's running batch: `python bench/engine.py batching|twins|turns [--model 290m] [--json FILE]`.

batching   32 mixed requests at once against the same ones after each other: output tokens/s of both, in turns.
           --mix chat     prompts of 161 tokens and answers of 338 in the mean, as in ShareGPT's conversations
                          (Kwon et al. 2023, arXiv:2309.06180, section 6.1); log-normal, prompts more uneven than
                          answers, which is our choice. The 32 are quantiles of it, so that their means are these
           --mix even     prompts of 16, 64, ... 512 tokens and answers of 32, ... 256, each as likely as the others
           Prompts cost the same on both sides. With P seconds for prompts and S for steps, one at a time, batching
           gains at most 1 + S / P; this bound is reported, and so is the share of each side's time in both
twins      a hybrid against its Transformer twin, as many sequences as a cache of fixed size holds, at 8k in / 1k out
           and 32k in / 256 out: output tokens/s, the reading of the prompts included. Pieces of a prompt are timed at
           eight depths and steps at eight fillings, and added up over the run; --whole runs everything instead

turns      a conversation of 16k tokens goes on: time to the first token of its second turn against the first one's

Weights are random, and no answer ends before its length. Prompts of a thousand tokens and more take minutes.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist, median
from typing import Any

import torch

from plait.cli.benches import frozen
from plait.cli.benches.sides import add_median, alternate
from plait.engine.core import Limits
from plait.engine.engine import Engine
from plait.engine.request import Request, Sampling
from plait.model.hybrid import Hybrid
from plait.report import Report, provenance

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
MIXES = ((8192, 1024), (32768, 256))
CHAT = {"prompts": (161.0, 0.9), "answers": (338.0, 0.55)}  # mean, and deviation of the logarithm
EVEN = {"prompts": (16, 64, 128, 256, 512), "answers": (32, 64, 128, 256)}
DEPTHS = 8


def requests_of(mix: str, n: int, vocab_size: int, scale: float, seed: int = 0) -> list[Request]:
    """Mixed ones, see above; lengths times `scale`."""
    r = random.Random(seed)
    prompts, answers = (quantiles(n, *of) for of in (CHAT["prompts"], CHAT["answers"]))
    r.shuffle(prompts), r.shuffle(answers)
    if mix == "even":
        r.seed(seed)
    made = []
    for i in range(n):
        length = prompts[i] if mix == "chat" else r.choice(EVEN["prompts"])
        prompt = tuple(r.randrange(vocab_size) for _ in range(max(1, round(scale * length))))
        answer = answers[i] if mix == "chat" else r.choice(EVEN["answers"])
        made.append(Request(prompt_ids=prompt, sampling=replace(GREEDY, max_tokens=max(2, round(scale * answer)))))
    return made


def quantiles(n: int, mean: float, sigma: float) -> list[float]:
    """n numbers spread as a log-normal distribution is, of this mean."""
    spread = [math.exp(NormalDist(sigma=sigma).inv_cdf((i + 0.5) / n)) for i in range(n)]
    return [mean * n * x / sum(spread) for x in spread]


def run(engine: Engine, requests: list[Request]) -> int:
    """Everything at once; output tokens."""
    for request in requests:
        engine.submit(request)
    n = 0
    while engine.has_work():
        n += sum(len(delta.token_ids) for delta in engine.step())
    return n


class Side:
    """Requests through an engine that runs so many at once; seconds in prompts and in steps, of each time."""

    def __init__(self, model: Hybrid, requests: list[Request], n: int) -> None:
        self.engine = Engine(model, limits=Limits(max_running=n, prefix_bytes=0))
        self.requests, self.prompts, self.steps, self.whole = requests, [], [], []
        core = self.engine.core
        core._read, core._write = self._timed(core._read, self.prompts), self._timed(core._write, self.steps)

    def _timed(self, call: Callable[[Any], Any], spent: list[float]) -> Callable[[Any], Any]:
        def timed(argument: object) -> object:
            begin = time.perf_counter()
            result = call(argument)
            spent[-1] += time.perf_counter() - begin
            return result

        return timed

    def rate(self) -> float:
        """Output tokens per second."""
        self.prompts.append(0.0), self.steps.append(0.0)
        begin = time.perf_counter()
        n_tokens = run(self.engine, self.requests)
        self.whole.append(time.perf_counter() - begin)
        return n_tokens / self.whole[-1]


def batching(report: Report, model: Hybrid, args: argparse.Namespace) -> None:
    """32 mixed requests together, after each other in the same engine, and by `generate` one at a time."""
    requests = requests_of(args.mix, args.requests, model.config.vocab_size, args.scale)
    report.add("prompts, mean", sum(len(r.prompt_ids) for r in requests) / len(requests), "tokens")
    report.add("answers, mean", sum(r.sampling.max_tokens for r in requests) / len(requests), "tokens")
    together, single = Side(model, requests, args.requests), Side(model, requests, 1)
    plain = Engine(model, max_batch=1)

    def generated() -> float:
        ids, begin = [list(request.prompt_ids) for request in requests], time.perf_counter()
        n_tokens = sum(len(c.token_ids) for c in plain.generate(ids, [request.sampling for request in requests]))
        return n_tokens / (time.perf_counter() - begin)

    sides = {
        "continuous batching": together.rate,
        "one at a time, same engine": single.rate,
        "one at a time, generate": generated,
    }
    found = alternate(sides, args.rounds, label="batching", budget_s=1e9)
    for name, values in found.items():
        add_median(report, name, values, "tokens/s")
    first = found["continuous batching"]
    for name in list(sides)[1:]:
        add_median(report, f"continuous / {name}", [a / b for a, b in zip(first, found[name], strict=True)], "x")
    report.add("bound: steps of the batch take no time", 1 + median(single.steps) / median(single.prompts), "x")
    for name, side in (("continuous batching", together), ("one at a time, same engine", single)):
        for what, spent in (("prompts", side.prompts), ("steps", side.steps)):
            report.add(f"{name}, in {what}", 100 * median(spent) / median(side.whole), "%")
    load = together.engine.load()
    report.add("steps", load.steps)
    report.add("longest wait", load.peak_wait_steps, "steps")


class Sized:
    """An engine whose cache of fixed size holds as many sequences of a mix as fit."""

    def __init__(self, model: Hybrid, n_bytes: int, prompt: int, answer: int) -> None:
        """Raises: ValueError if not even one fits."""
        self.model, self.prompt, self.answer = model, prompt, answer
        one = Engine(model, limits=Limits(cache_bytes=1 << 28, max_running=1)).core.pool
        each = one.slot_bytes + one.pages_for(prompt + answer) * one.page_bytes
        if each > n_bytes:
            raise ValueError(f"one sequence of {prompt + answer} tokens needs {each} bytes of cache, not {n_bytes}")
        self.n = n_bytes // each
        limits = Limits(cache_bytes=self.n * each, max_running=self.n, prefix_bytes=0)
        self.engine, self.each = Engine(model, limits=limits), each

    def whole(self) -> float:
        """Seconds of really running it."""
        r = random.Random(0)
        ids = (tuple(r.randrange(self.model.config.vocab_size) for _ in range(self.prompt)) for _ in range(self.n))
        sampling = replace(GREEDY, max_tokens=self.answer)
        begin = time.perf_counter()
        run(self.engine, [Request(prompt_ids=prompt, sampling=sampling) for prompt in ids])
        return time.perf_counter() - begin

    @torch.inference_mode()
    def parts(self) -> tuple[float, float]:
        """Seconds of reading one prompt, and of one step of all sequences on the way, from a few of each."""
        from plait.model.paged import Rows
        from plait.model.step import step_rows

        core, piece = self.engine.core, self.engine.limits.piece
        leases = [core.pool.open(self.prompt + self.answer) for _ in range(self.n)]
        held = [lease for lease in leases if lease is not None]
        ids = torch.ones(1, piece, dtype=torch.int64)
        read, steps = [], []
        for i in range(DEPTHS):
            first = int((i + 0.5) * self.prompt / DEPTHS) // piece * piece
            rows = Rows(core.pool.cache, [held[0].slot], [held[0].pages], [first])
            read.append(seconds(lambda rows=rows: self.model.hidden(ids, cache=rows)))
            length = self.prompt + int((i + 0.5) * self.answer / DEPTHS)
            slots, tables = [lease.slot for lease in held], [lease.pages for lease in held]
            lengths = [length] * self.n
            places = [1] * self.n, slots, lengths, tables
            steps.append(seconds(lambda places=places: step_rows(self.model, core.pool.cache, *places)))
        for lease in held:
            core.pool.close(lease)
        return sum(read) / DEPTHS * self.prompt / piece, sum(steps) / DEPTHS


def seconds(call: Callable[[], object]) -> float:
    """The quicker of two."""
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return min(took)


def twins(report: Report, models: dict[str, Hybrid], args: argparse.Namespace) -> None:
    """Both with as many sequences as fit."""
    for prompt, answer in MIXES:
        rates = {}
        for name, model in models.items():
            what = f"{prompt}/{answer} {name}"
            try:
                sized = Sized(model, args.cache, prompt, answer)
            except ValueError as error:
                report.add(f"{what}: {error}", 0, "tokens/s")
                continue
            report.add(f"{what} sequences", sized.n)
            report.add(f"{what} cache of one", sized.each, "bytes")
            if args.whole:
                total = sized.whole()
            else:
                reading, step = sized.parts()
                report.add(f"{what} reading one prompt", reading, "s")
                report.add(f"{what} step of all", step, "s")
                report.add(f"{what} output while writing only", sized.n / step, "tokens/s")
                total = sized.n * reading + answer * step
            rates[name] = sized.n * answer / total
            report.add(f"{what} output", rates[name], "tokens/s")
        if len(rates) == 2:
            report.add(f"{prompt}/{answer} hybrid / twin", rates["hybrid"] / rates["twin"], "x")


def turns(report: Report, model: Hybrid, args: argparse.Namespace) -> None:
    """Both turns' times to the first token; the second adds 32 tokens to the first and its answer."""
    r = random.Random(0)
    engine = Engine(model, limits=Limits(cache_bytes=args.cache))
    told = [r.randrange(model.config.vocab_size) for _ in range(round(16384 * args.scale))]
    waits = []
    for turn in ("first", "second"):
        handle = engine.submit(Request(prompt_ids=tuple(told), sampling=replace(GREEDY, max_tokens=64)))
        while engine.has_work():
            told += [token for delta in engine.step() for token in delta.token_ids]
        assert handle.first_token_s is not None
        waits.append(handle.first_token_s - handle.submitted_s)
        report.add(f"time to the first token of the {turn} turn", waits[-1], "s")
        told += [r.randrange(model.config.vocab_size) for _ in range(32)]
    report.add("second / first", 100 * waits[1] / waits[0], "%")
    load = engine.load()
    report.add("tokens that were not read again", load.prefix_tokens)
    report.add("snapshots", load.prefix_bytes, "bytes")


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("batching", "twins", "turns"))
    parser.add_argument("--model", default="290m", help="of batching")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--mix", choices=("chat", "even"), default="chat", help="of batching")
    parser.add_argument("--scale", type=float, default=1.0, help="of prompts and answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=int, default=1 << 30, help="bytes, of twins")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default="", help="file of JSON lines")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    mix = f", {args.mix} x {args.scale:g}" if args.what == "batching" else ""
    report = Report(f"engine, {args.what}{mix}, {args.recipe}", provenance=provenance(0))
    report.add("threads", torch.get_num_threads())
    names = {"hybrid": args.model} | ({"twin": "twin"} if args.what == "twins" else {})
    models = {}
    for name, known in names.items():
        with frozen.checkpoint_of(known) as folder:
            models[name] = frozen.loaded(folder, args.recipe)
        report.add(f"{name} parameters", models[name].config.cost().params)
    if args.what == "twins":
        twins(report, models, args)
    else:
        (batching if args.what == "batching" else turns)(report, models["hybrid"], args)
    print(report.table())
    if args.json:
        report.save_jsonl(args.json)


if __name__ == "__main__":
    main()
