"""Writing, a token per sequence and step: tokens/s, the bytes that a step reads, and the share of the read bandwidth.

    bytes of a step = weights but the input embedding + states + keys and values of all tokens so far

The tokens fed are random and nothing is drawn from the logits, as in llama-bench. A cache at a depth holds random keys
and values of that many tokens (speed depends on how much there is to read, not on what it says); llama-bench reads a
random prompt of that length instead. Each round goes on where the last one ended: a depth is that of the first step.
"""

from collections.abc import Callable, Sequence

import torch

from plait.cli.bench import Inputs
from plait.cli.benches import frozen, limits, shapes
from plait.cli.benches.peers import Peers
from plait.cli.benches.sides import OURS, Side, add_median, add_ratio, add_share, alternate, timed
from plait.cli.benches.theirs import Continued
from plait.compress.stopwatch import filled
from plait.model.hybrid import Hybrid
from plait.report import Report, provenance

DEPTHS = (16, 8192)
RECIPES = ("bf16", "int8", "int4")
TERNARY = ("ternary-packed-int8",)
PLAIN = f"{OURS} in bf16"
READ = f"{OURS} read"
# the first run of llama-bench at a depth reads the whole prompt for all rounds
BUDGET_S = 240.0


def measure(inputs: Inputs) -> Report:
    """Measure every recipe at every depth, beside the peers."""
    name = inputs.model or "290m"
    config = shapes.config_of(name)
    report = Report(f"decode, {config.name or name}, batch {inputs.batch}", provenance=provenance(seed=0))
    report.add("threads", torch.get_num_threads())
    report.add("parameters", config.cost().params)
    is_ternary = config.recipe == "ternary"
    recipes = inputs.recipe or (TERNARY if is_ternary else RECIPES)
    with frozen.checkpoint_of(name) as source:
        plain = frozen.plain_logits(source, recipes)
        # what few bits are worth, in turns with them: the same sizes in bfloat16
        beside = frozen.loaded(source, "bf16") if is_ternary and recipes != ("bf16",) else None
        for recipe in recipes:
            model = frozen.loaded(source, recipe)
            ours = frozen.check_ours(report, model, recipe, plain)
            report.add(f"{recipe} weights read per token", shapes.weight_bytes(model), "bytes")
            report.add(f"{recipe} weights but embedding and head", shapes.layer_bytes(model), "bytes")
            peers = Peers(report, inputs, name, recipe, model)
            peers.check(ours if plain is None or recipe in frozen.AGREE else plain)
            depths = inputs.depth or DEPTHS
            for depth in depths:
                _measure(report, inputs, recipe, model, depth, peers, beside if recipe != "bf16" else None)
            if len(depths) > 1:
                _compare(report, inputs, recipe, model, depths)
    return report


def _compare(report: Report, inputs: Inputs, recipe: str, model: Hybrid, depths: Sequence[int]) -> None:
    """How much slower a deeper context is: our own steps at each depth in turns, as minutes apart differ by more."""
    sides = {str(depth): steps(model, depth, inputs.batch, inputs.steps, inputs.rounds) for depth in depths}
    found = alternate(sides, inputs.rounds, label=f"{recipe} depths in turns", report=report, budget_s=BUDGET_S)
    first = str(depths[0])
    for depth in depths[1:]:
        # seconds, so that the shallow one over the deep one is a ratio of speeds
        add_ratio(report, f"{recipe} speed at depth {depth} / at depth {first}", found[first], found[str(depth)])


def _measure(
    report: Report, inputs: Inputs, recipe: str, model: Hybrid, depth: int, peers: Peers, beside: Hybrid | None
) -> None:
    """Measure one depth."""
    where, batch = f"{recipe} depth {depth}", inputs.batch
    sides: dict[str, Side] = {OURS: steps(model, depth, batch, inputs.steps, inputs.rounds)}
    if beside is not None:
        sides[PLAIN] = steps(beside, depth, batch, inputs.steps, inputs.rounds)
    if peers.theirs is not None:
        sides["transformers"] = _their_steps(peers.theirs, model.config.vocab_size, depth, batch, inputs.steps)
    if batch == 1:
        sides |= {name: llama.decode(inputs.steps, depth, inputs.rounds) for name, llama in peers.llamas.items()}
    sides[READ] = limits.read_of(t.detach() for t in model.state_dict().values())
    found = alternate(sides, inputs.rounds, label=where, report=report, budget_s=BUDGET_S)
    reads = found.pop(READ)
    # llama-bench gives rates, the others seconds per step
    rates = {side: values if side in peers.llamas else [batch / s for s in values] for side, values in found.items()}
    n_bytes = shapes.weight_bytes(model) + shapes.cache_bytes(model.config, depth, batch)
    report.add(f"{where} bytes read per step", n_bytes, "bytes")
    add_median(report, f"{where} read bandwidth", [r / 1e9 for r in reads], "GB/s")
    for side, values in rates.items():
        add_median(report, f"{where} {side}", values, "tokens/s")
    add_share(report, f"{where} {OURS}, share of the bandwidth", rates[OURS], n_bytes / batch, reads)
    for side, values in rates.items():
        if side != OURS:
            add_ratio(report, f"{where} {OURS} / {side}", rates[OURS], values)


def steps(model: Hybrid, depth: int, batch: int, count: int, rounds: int) -> Side:
    """A side: mean seconds of `count` steps of our model, in inference mode; room for all rounds is made before."""
    cache = filled(model, depth, batch)
    cache.reserve(depth + (rounds + 1) * count)
    ids = frozen.prompt(model.config.vocab_size, count, batch, seed=1)
    each = [ids[:, i : i + 1].contiguous() for i in range(count)]

    @torch.inference_mode()
    def run() -> None:
        for one in each:
            model(one, cache=cache, n_logits=1)

    return _per_step(run, count)


def _their_steps(theirs: torch.nn.Module, vocab_size: int, depth: int, batch: int, count: int) -> Side:
    ids = frozen.prompt(vocab_size, count, batch, seed=1)
    with torch.inference_mode():
        started = Continued(theirs, frozen.prompt(vocab_size, 2, batch))
        started.deepen(max(depth, 2))

    @torch.inference_mode()
    def run() -> None:
        for i in range(count):
            started.step(ids[:, i : i + 1])

    return _per_step(run, count)


def _per_step(run: Callable[[], object], count: int) -> Side:
    whole = timed(run)
    return lambda: whole() / count
