"""Reading a prompt: tokens/s of the engine until the first token is drawn, and the share of the GEMM peak.

FLOPs are those of matrix products only, and only those that are needed: attention counts the keys that each token may
see, the head counts once per prompt, because nobody reads the other positions' logits; the peers too are asked for the
last position only. "By parameters" is the common estimate of 2 FLOPs per parameter and token, with the head everywhere.

A peer whose time grows faster than the prompt is left out where one run would exceed the patience.
"""

import torch

from plait.cli.bench import Inputs
from plait.cli.benches import frozen, limits, shapes
from plait.cli.benches.peers import Peers
from plait.cli.benches.sides import OURS, Side, add_median, add_ratio, add_share, alternate, timed
from plait.cli.benches.theirs import Continued
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.report import Report, provenance

LENGTHS = (512, 2048, 8192)
BUDGET_S = 40.0


def measure(inputs: Inputs) -> Report:
    """Measure every recipe at every length, beside the peers."""
    name = inputs.model or "290m"
    config = shapes.config_of(name)
    report = Report(f"prefill, {config.name or name}, batch {inputs.batch}", provenance=provenance(seed=0))
    report.add("threads", torch.get_num_threads())
    report.add("parameters", config.cost().params)
    report.add("FLOPs counted", "of matrix products; attention over visible keys; the head for the last position only")
    recipes = inputs.recipe or ("bf16",)
    with frozen.checkpoint_of(name) as source:
        plain = frozen.plain_logits(source, recipes)
        for recipe in recipes:
            model = frozen.loaded(source, recipe)
            ours = frozen.check_ours(report, model, recipe, plain)
            peers = Peers(report, inputs, name, recipe, model)
            peers.check(ours if plain is None or recipe in frozen.AGREE else plain)
            engine = Engine(model)
            report.add(f"{recipe} tokens per pass of the engine", engine.prefill_chunk)
            for length in inputs.tokens or LENGTHS:
                _measure(report, inputs, recipe, engine, length, peers)
    return report


def _measure(report: Report, inputs: Inputs, recipe: str, engine: Engine, length: int, peers: Peers) -> None:
    config, batch = engine.model.config, inputs.batch
    where = f"{recipe} {length} tokens"
    sides: dict[str, Side] = {OURS: _ours(engine, length, batch)}
    if peers.theirs is not None and peers.has_patience(length, where):
        sides["transformers"] = _theirs(peers.theirs, frozen.prompt(config.vocab_size, length, batch))
    if batch == 1:
        sides |= {name: llama.prefill(length) for name, llama in peers.llamas.items()}
    peak = f"{OURS} peak"
    sides[peak] = limits.gemm(torch.float32 if recipe == "fp32" else torch.bfloat16)
    found = alternate(sides, inputs.rounds, label=where, report=report, budget_s=BUDGET_S)
    peaks = found.pop(peak)
    # llama-bench gives rates, the others seconds
    rates = {
        side: values if side in peers.llamas else [batch * length / s for s in values] for side, values in found.items()
    }
    peers.remember(length, found)
    add_median(report, f"{where} GEMM peak", [p / 1e9 for p in peaks], "GFLOP/s")
    for side, values in rates.items():
        add_median(report, f"{where} {side}", values, "tokens/s")
        needed = shapes.prefill_flops(config, length) / length
        estimate = shapes.parameter_flops(config, length) / length
        add_share(report, f"{where} {side}, share of the GEMM peak", values, needed, peaks)
        add_share(report, f"{where} {side}, by parameters", values, estimate, peaks)
    for side, values in rates.items():
        if side != OURS:
            add_ratio(report, f"{where} {OURS} / {side}", rates[OURS], values)


def _ours(engine: Engine, length: int, batch: int) -> Side:
    prompts = frozen.prompt(engine.model.config.vocab_size, length, batch).tolist()
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)

    def side() -> float:
        done = list(engine.generate(prompts, sampling))
        return max(one.timings.prefill_s for one in done)

    return side


def _theirs(theirs: torch.nn.Module, ids: torch.Tensor) -> Side:
    @torch.inference_mode()
    def run() -> None:
        Continued(theirs, ids)

    return timed(run)
