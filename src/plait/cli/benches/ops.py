"""Every operation at the sizes of a model: as it is dispatched, against its reference and its floor.

    floor = the longer of (bytes over read bandwidth) and (FLOPs over GEMM peak);    share = floor / time

Results, and gradients where they are asked for, are held against the reference before anything is timed. The scan of
the state space is timed against the plain chunked form, because its reference goes token by token. What fits into the
processor's cache may be faster than its floor.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from plait.cli.bench import Inputs
from plait.cli.benches import limits, shapes
from plait.cli.benches.case import Case
from plait.cli.benches.few_bits import few_bits
from plait.cli.benches.gpu_peers import gpu_peers
from plait.cli.benches.many import many
from plait.cli.benches.sides import OURS, Side, add_median, alternate, require_equal, timed
from plait.cli.benches.single import single
from plait.cli.drawing import Drawn
from plait.report import provenance

# model -> tokens per call
TOKENS = {"45m": 2048, "290m": 2048, "nemotron-h-8b": 512}
DEPTH = 8192
# of bfloat16 results, as norms: half an ulp is 2e-3
AGREE = 2e-2
# a run shorter than this is repeated
LEAST_S = 0.03
MOST_REPEATS = 200
BUDGET_S = 8.0
GPU_PEERS = ("fla", "mamba_ssm")
SLOW, READ, PEAK = f"{OURS} slow", f"{OURS} read", f"{OURS} peak"
HEAD: tuple[str, ...] = ("operation", "backend", "ms", "against", "ms", "times", "floor, ms", "share")


def measure(inputs: Inputs) -> Drawn:
    """Measure the operations of one model, or of all three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Drawn("operations", provenance=provenance(seed=0))
    report.add("threads", torch.get_num_threads())
    lines = []
    for name in (inputs.model,) if inputs.model else TOKENS:
        config = shapes.config_of(name)
        tokens = (inputs.tokens or (TOKENS.get(name, 2048),))[0]
        lines += ["", f"{name}, {tokens} tokens, {torch.get_num_threads()} threads"]
        rows = [HEAD]
        for case in _cases(config, tokens, device):
            rows.append(_measure(report, inputs, f"{name} {case.name}", case, device))
        lines += _aligned(rows)
    report.drawing = "\n".join([report.title, *lines])
    return report


def _cases(config: shapes.ModelConfig, tokens: int, device: str) -> Iterator[Case]:
    yield from many(config, tokens, device)
    yield from few_bits(config, tokens, device)
    if device == "cpu":
        yield from single(config, DEPTH)


def _measure(report: Drawn, inputs: Inputs, name: str, case: Case, device: str) -> tuple[str, ...]:
    for i, (ours, theirs) in enumerate(case.results()):
        if theirs.numel():
            require_equal(f"{name}, result {i}", ours, theirs, AGREE)
    sides: dict[str, Side] = {OURS: _long_enough(case.fast, case.parts), SLOW: _long_enough(case.slow, case.parts)}
    for peer in sorted(set(inputs.against) & set(GPU_PEERS)):
        theirs = gpu_peers(peer, case)
        if theirs is None:
            report.add(f"{name} {peer}", "left out: it has no such operation, or needs a GPU")
        else:
            sides[peer] = _checked(name, peer, case, theirs)
    sides |= {READ: limits.read(device), PEAK: limits.gemm(torch.bfloat16, device=device)}
    found = alternate(sides, inputs.rounds, label=name, report=report, budget_s=BUDGET_S)
    floors = [
        limits.floor_s(case.n_bytes, case.flops, read, peak)
        for read, peak in zip(found[READ], found[PEAK], strict=True)
    ]
    fast = add_median(report, f"{name} [{case.backend}]", [1e3 * s for s in found[OURS]], "ms")
    slow = add_median(report, f"{name} [{case.against}]", [1e3 * s for s in found[SLOW]], "ms")
    times = add_median(report, f"{name}, times faster", _ratios(found[SLOW], found[OURS]), "x")
    floor = add_median(report, f"{name}, floor", [1e3 * s for s in floors], "ms")
    share = add_median(report, f"{name}, share of the limit", _ratios(floors, found[OURS]), "of the limit")
    for peer in found.keys() & set(GPU_PEERS):
        add_median(report, f"{name} [{peer}]", [1e3 * s for s in found[peer]], "ms")
        add_median(report, f"{name}, {peer} / plait", _ratios(found[peer], found[OURS]), "x")
    return (
        *(case.name, case.backend, f"{fast:.4g}", case.against, f"{slow:.4g}"),
        *(f"{times:.2f}", f"{floor:.3g}", f"{share:.0%}"),
    )


def _long_enough(run: Callable[[], object], parts: int = 1) -> Side:
    """A side: seconds of one of a run's parts; the run is repeated where the clock would blur it."""
    run()
    begin = time.perf_counter()
    run()
    repeats = max(1, min(MOST_REPEATS, int(LEAST_S / max(time.perf_counter() - begin, 1e-9))))
    whole = timed(run, repeats)
    return lambda: whole() / parts


def _checked(name: str, peer: str, case: Case, theirs: Callable[[], list[torch.Tensor]]) -> Side:
    """A side whose first run is compared with ours; one that computes something else fails."""
    side: list[Side] = []

    def run() -> float:
        if not side:
            ours = case.fast()
            assert isinstance(ours, list)
            for i, (a, b) in enumerate(zip(ours, theirs(), strict=False)):
                require_equal(f"{name}, result {i}: ours and {peer}", a, b, AGREE)
            side.append(_long_enough(theirs))
        return side[0]()

    return run


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    wide = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    words = (0, 1, 3)
    return [
        "  "
        + "  ".join(
            f"{cell:<{w}}" if i in words else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in rows
    ]


def _ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=False)]
