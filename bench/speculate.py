"""Measure speculation on code that is edited: `python bench/speculate.py [--steps 800] [--json FILE]`.

A small hybrid is trained to do what is asked of it: rename something in a piece of code, and write the whole piece
anew. Then answers to such prompts are timed with and without guesses looked up in the text, in turns, greedy and drawn.
The tokens must be the same. Training takes some minutes; --model keeps it in a folder for the next time. A model small
enough to be trained here costs next to nothing per token, so --idle layers are put behind its own that read their
weights as any others but add nothing: the answers are the trained model's, the cost is that of a model of their size.
"""

import argparse
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from plait.cli.benches.sides import add_median, add_ratio, alternate
from plait.engine.core import Limits
from plait.engine.engine import Engine
from plait.engine.request import Request, Sampling
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.report import Report, provenance
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer

NAMES = "total width count index value left right node step size price name item score level speed".split()
LINES = (
    "{a} = {b} + {n}\n",
    "if {a} > {b}:\n    {c} = {n}\n",
    "for {a} in range({n}):\n    {b} += {a}\n",
    "return {a} * {b}\n",
    "print({a}, {b}, {c})\n",
    "{a} = max({b}, {n})\n",
)
END = "<|eos|>"


def edit(r: random.Random, n_lines: int) -> tuple[str, str]:
    """A piece of code with a wish, and the piece as it should become."""
    names = r.sample(NAMES, 6)
    old, new, kept = names[0], names[1], names[1:]
    lines = []
    for _ in range(n_lines):
        a, b, c = r.choice([old, *kept[1:]]), r.choice(kept[1:]), r.choice(kept[1:])
        lines.append(r.choice(LINES).format(a=a, b=b, c=c, n=r.randrange(100)))
    code = "".join(lines)
    return f"{code}# rename {old} to {new}\n", code.replace(old, new)


def batches(tokenizer: Tokenizer, n_rows: int, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels: rows of prompts with their answers."""
    r = random.Random(0)
    while True:
        ids, labels = torch.zeros(n_rows, length, dtype=torch.int64), torch.full((n_rows, length), -100)
        for row in range(n_rows):
            prompt, answer = (tokenizer.encode(text) for text in edit(r, r.randrange(1, 5)))
            whole = [*prompt, *answer, *tokenizer.encode(END)][:length]
            ids[row, : len(whole)] = torch.tensor(whole)
            labels[row, : len(whole)] = ids[row, : len(whole)]
        yield ids, labels


def trained(steps: int, width: int) -> tuple[Hybrid, Tokenizer]:
    """A hybrid that edits, and its tokenizer."""
    r = random.Random(1)
    tokenizer = train_bpe(("".join(edit(r, 8)) for _ in range(2000)), 512)
    config = ModelConfig.from_pattern(
        "M*-M*-",
        vocab_size=512,
        d_model=width,
        mamba2={"n_heads": width // 16, "head_dim": 32, "d_state": 32, "n_groups": 1, "chunk": 64},
        attention={"n_heads": width // 32, "n_kv_heads": width // 64, "head_dim": 32},
        mlp={"d_ff": 3 * width},
        init_std=0.5 * width**-0.5,
    )
    model = build(config, recipe="fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    begin, losses = time.perf_counter(), []
    for step, (ids, labels) in zip(range(steps), batches(tokenizer, 32, 96), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * min(1.0, 2 * (1 - step / steps))
        loss = model(ids, labels=labels).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            logging.info("step %d: loss %.3f, %.0f s", step + 1, sum(losses[-50:]) / 50, time.perf_counter() - begin)
    return model.requires_grad_(False), tokenizer


def kept(args: argparse.Namespace) -> tuple[Hybrid, Tokenizer]:
    """The trained model, from its folder if it is there."""
    folder = Path(args.model) if args.model else None
    if folder is not None and folder.is_dir():
        return load(folder, recipe=args.recipe), Tokenizer.open(folder)
    model, tokenizer = trained(args.steps, args.width)
    if folder is not None:
        save(model, folder, format="native")
        tokenizer.save(folder)
        return load(folder, recipe=args.recipe), tokenizer
    return model, tokenizer


def idled(model: Hybrid, n_layers: int, d_ff: int) -> Hybrid:
    """The model with feed-forward layers behind its own whose output weights are zero."""
    if not n_layers:
        return model
    own = model.config
    idle = ModelConfig.from_pattern("-" * n_layers, vocab_size=2, d_model=own.d_model, mlp={"d_ff": d_ff})
    larger = build(replace(own, layers=(*own.layers, *idle.layers)), recipe=model.recipe)
    weights = larger.state_dict()
    for name in weights:
        if name.endswith("down_proj.weight") and int(name.split(".")[1]) >= len(own.layers):
            weights[name].zero_()
    larger.load_state_dict(weights | model.state_dict())
    return larger.requires_grad_(False)


def timed(engine: Engine, requests: list[Request], made: list[list[int]]) -> Callable[[], float]:
    """Tokens per second of processor time, one request after the other; leaves the tokens in `made`."""

    def side() -> float:
        made.clear()
        begin = time.process_time()
        for request in requests:
            handle = engine.submit(request)
            while engine.has_work():
                engine.step()
            made.append(handle.sequences[0].row.ids)
        return sum(map(len, made)) / (time.process_time() - begin)

    return side


def measure(report: Report, model: Hybrid, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Both ways, greedy and drawn."""
    r = random.Random(2)
    asked = [edit(r, args.lines) for _ in range(args.requests)]
    for what, temperature in (("greedy", 0.0), ("drawn", 0.7)):
        requests = []
        for i, (prompt, answer) in enumerate(asked):
            s = Sampling(max_tokens=2 * len(tokenizer.encode(answer)), temperature=temperature, seed=i)
            requests.append(Request(prompt_ids=tuple(tokenizer.encode(prompt)), sampling=s, thinks=False))
        engines = {n: Engine(model, tokenizer, limits=Limits(guesses=n, prefix_bytes=0)) for n in (0, args.guesses)}
        made: dict[int, list[list[int]]] = {n: [] for n in engines}
        names = {0: f"{what}, without", args.guesses: f"{what}, {args.guesses} guesses"}
        found = alternate({names[n]: timed(engines[n], requests, made[n]) for n in engines}, args.rounds, budget_s=1e9)
        for name, values in found.items():
            add_median(report, name, values, "tokens/s")
        add_ratio(report, f"{what}, with / without", found[names[args.guesses]], found[names[0]])
        load = engines[args.guesses].load()
        report.add(f"{what}, right guesses", load.guessed_right / max(load.guessed, 1), "of 1")
        right = sum(tokenizer.decode(ids) == answer for ids, (_, answer) in zip(made[0], asked, strict=True))
        report.add(f"{what}, edits done as asked", right / len(asked), "of 1")
        report.add(f"{what}, same tokens", float(made[0] == made[args.guesses]), "of 1")


def main() -> None:
    """Train or load, measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder to keep the trained model in")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--idle", type=int, default=6, help="layers that add nothing")
    parser.add_argument("--idle-width", type=int, default=24576, help="of these")
    parser.add_argument("--guesses", type=int, default=7)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--lines", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", help="file of JSON lines")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    report = Report("speculation on edited code", provenance=provenance(0))
    model, tokenizer = kept(args)
    report.add("trained parameters", model.config.cost().params)
    model = idled(model, args.idle, args.idle_width)
    report.add("parameters", model.config.cost().params)
    measure(report, model, tokenizer, args)
    print(report.table())
    if args.json:
        report.save_jsonl(args.json)


if __name__ == "__main__":
    main()
