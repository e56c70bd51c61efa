"""A server under load: how long people wait for the first token and between tokens, while how many tokens are made.

Any server of OpenAI's protocol will do, and a second one is asked the same words at the same times, in turns, by the
same client. What the figures mean says serve_figures.py.
"""

import asyncio
import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plait.cli.bench import Inputs
from plait.cli.benches.serve_client import DIALECTS, Heard, ServerError, Target, get, hear
from plait.cli.benches.serve_figures import Level, Round, add_level, draw, summed, table
from plait.cli.benches.serve_load import Mix, Tokens, arrivals, closed_loop, open_loop, text_of
from plait.cli.drawing import Drawn, render
from plait.report import Report, provenance
from plait.train.metrics import write_whole

# two lengths of text from which follows how many tokens a word has
PROBES = (40, 240)

log = logging.getLogger(__name__)


def measure(inputs: Inputs) -> Report:
    """Measure every load, one server after the other."""
    mix = Mix.read(inputs.mix)
    levels = [Level(rate=rate) for rate in inputs.rate] + [Level(askers=n) for n in inputs.concurrency]
    levels = levels or [Level(askers=n) for n in (1, 2, 4, 8)]
    report = Drawn(f"serve, {inputs.mix}, {inputs.requests} requests per load", provenance=provenance(inputs.seed))
    rounds = asyncio.run(_measure(inputs, mix, levels, report))
    for level in levels:
        add_level(report, level, rounds[level.name])
    report.drawing = render(report.title, "", table(levels, rounds), *_ratios(report))
    if inputs.chart:
        path = Path(inputs.chart)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, draw(levels, rounds))
    return report


async def _measure(
    inputs: Inputs, mix: Mix, levels: Sequence[Level], report: Report
) -> dict[str, dict[str, list[Round]]]:
    urls = {"server": inputs.url, **({"against": inputs.against[0]} if inputs.against else {})}
    targets = {name: await met(name, url, inputs, mix, report) for name, url in urls.items()}
    # both are asked with the words that fit the first one's tokenizer
    tokens = await sized(targets["server"], report)
    await _add_agreement(report, targets)
    found: dict[str, dict[str, list[Round]]] = {level.name: {name: [] for name in targets} for level in levels}
    for level in levels:
        for turn in range(inputs.rounds):
            # no words come twice: what is cached of one round must not help the next
            seed = hash_of(inputs.seed, level.name, turn)
            wanted = mix.draw(inputs.requests, seed)
            requests = [(tokens.text(one.prompt, one.seed), one.answer) for one in wanted]
            for name, target in targets.items():
                heard = await _load(target, level, requests, seed)
                found[level.name][name].append(summed(heard))
                log.info("%s, round %d of %d: %s", level.name, turn + 1, inputs.rounds, _told(name, summed(heard)))
    return found


async def _load(target: Target, level: Level, requests: Sequence[tuple[str, int]], seed: int) -> list[Heard]:
    async def ask(prompt: str, n: int, due_s: float) -> Heard:
        return await hear(target, prompt, n, due_s)

    if level.rate:
        return await open_loop(ask, requests, arrivals(len(requests), level.rate, seed))
    return await closed_loop(ask, requests, level.askers)


async def met(name: str, url: str, inputs: Inputs, mix: Mix, report: Report) -> Target:
    """A server that answers, with the name of its model and the way to have answers of full length.

    Raises: ServerError if it does not serve; ValueError if its context is too short for the mix.
    """
    model, room = await _model(name, url, inputs)
    if room is not None and mix.longest > room:
        raise ValueError(f"mix={inputs.mix!r} needs {mix.longest} tokens of context; {url} has {room}")
    target = Target(url=url, name=name, key=inputs.key, model=model, api=inputs.api, patience_s=inputs.patience)
    report.add(f"{name} model", model)
    report.add(f"{name} url", url)
    said = []
    for dialect in DIALECTS:
        tried = replace(target, dialect=dialect)
        heard = await hear(tried, text_of(8, inputs.seed), 24)
        if not heard.error and (heard.tokens == 24 or dialect == "none"):
            report.add(f"{name} answers have the length that was asked for", heard.tokens == 24)
            return tried
        said.append(f"{dialect}: {heard.error or f'{heard.tokens} of 24 tokens'} {heard.text[:160]}".strip())
    raise ServerError(f"{url} does not answer a first question: {'; '.join(said)}")


async def _model(name: str, url: str, inputs: Inputs) -> tuple[str, int | None]:
    """What a server calls its model, and how many tokens that takes, if it says so."""
    wanted = inputs.model.split(",")
    model = wanted[-1 if name == "against" else 0]
    target = Target(url=url, name=name, key=inputs.key)
    try:
        entries = (await get(target, "/v1/models")).get("data")
    except (OSError, ValueError, EOFError, TimeoutError, ServerError) as error:
        # some servers only list what they have in a cache of their own
        if model:
            log.warning("%s lists no models (%s); asking for %s", url, error, model)
            return model, None
        words = error or type(error).__name__
        raise ServerError(f"{url}/v1/models does not answer ({words}); is it there? --model names one") from None
    known = {str(one["id"]): one.get("max_model_len") for one in entries} if isinstance(entries, list) else {}
    if not model and not known:
        raise ServerError(f"{url}/v1/models names no model; --model does")
    model = model or next(iter(known))
    room = known.get(model)
    return model, room if isinstance(room, int) else None


async def sized(target: Target, report: Report) -> Tokens:
    """How many tokens our words have there.

    Raises: ServerError if the server does not count tokens.
    """
    counts = []
    for n in PROBES:
        heard = await hear(target, text_of(n, n), 1)
        if heard.error or not heard.prompt_tokens:
            raise ServerError(f"{target.url} does not tell how many tokens a prompt has: {heard.error or 'no usage'}")
        counts.append(heard.prompt_tokens)
    per_word = (counts[1] - counts[0]) / (PROBES[1] - PROBES[0])
    report.add("tokens per word", per_word)
    return Tokens(fixed=counts[0] - per_word * PROBES[0], per_word=per_word)


async def _add_agreement(report: Report, targets: dict[str, Target]) -> None:
    if len(targets) < 2:
        return
    said = [(await hear(target, text_of(32, 1), 32)).text for target in targets.values()]
    same = next((i for i, (a, b) in enumerate(zip(*said, strict=False)) if a != b), min(map(len, said)))
    report.add("greedy answers agree", said[0] == said[1])
    report.add("characters until they differ", same)


def _ratios(report: Report) -> list[str]:
    """Facts that compare two servers, as lines."""
    facts = [fact for fact in report.facts if "server / against" in fact.name and isinstance(fact.value, float)]
    return ["", *(f"{fact.name}: {fact.value:.3g} times" for fact in facts)] if facts else []


def hash_of(seed: int, *parts: object) -> int:
    """A seed for a part of the whole, the same in every process."""
    return zlib.crc32(repr((seed, *parts)).encode())


def _told(name: str, done: Round) -> str:
    figures = done.figures
    words = f"{name} {done.ends.get('whole', 0)} answers"
    if figures:
        words += f", {figures['output tokens/s']:.1f} tokens/s, first after {figures['time to first token p50']:.0f} ms"
    return words + "".join(f", {n} {end}" for end, n in done.ends.items() if end != "whole")
