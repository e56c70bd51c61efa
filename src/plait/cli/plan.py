"""`plait plan`: what a model needs of a machine at a context and batch, and how fast it can be at most, before it runs.

Arithmetic of `model/plan.py`: nothing is loaded, allocated or measured, but for the machine "this".
"""

import re
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from plait.cli.drawing import Drawn, count, flops, render, size
from plait.cli.info import find_model, tokens_of
from plait.cli.launch import arg
from plait.cli.weights import weights
from plait.config import ConfigError, bytes_of, nearest
from plait.model.config import ModelConfig
from plait.model.hybrid import recipe_of
from plait.model.plan import MACHINES, PIECE, Machine, Needs, decode_s, max_batch, needs, prefill_s, rate
from plait.model.presets import PRESETS
from plait.report import Report

EXAMPLE = """plait plan nemotron-h-8b --context 1000000 --device h200
  plait plan nemotron-h-8b --context 64k --answer 1024 --device h100
  plait plan path/to/checkpoint --recipe int4 --device 24GiB"""
THIS = "this"
# what files of `plait bench device --save` are called
PROFILE = ".jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to plan: a model, its load, and where."""

    model: str | None = arg(default=None, help="a preset's name or a checkpoint folder", positional=True)
    context: str | None = arg(
        default=None, help="tokens per sequence, such as 1000000 or 128k; the model's own if not given"
    )
    batch: int = arg(default=1, help="sequences at once")
    answer: int = arg(default=0, help="tokens to draw after each context: also gives the best batch and its speed")
    device: str = arg(
        default="h200",
        help=f"{', '.join(MACHINES)}, this (measured), a file of plait bench device --save, "
        "or only a memory such as 24GiB",
    )
    recipe: str | None = arg(default=None, help="number format of weights and cache; the model's own if not given")
    reserve: str = arg(default="", help="memory left free, such as 1GiB; 2GiB if not given, or a tenth if that is less")
    piece: int = arg(default=PIECE, help="tokens of prompts that are read at once")

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError(f"which model? give a checkpoint folder or a preset: {', '.join(PRESETS)}")
        for field, least in (("batch", 1), ("piece", 1), ("answer", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least {least}")
        if self.context is not None:
            tokens_of(self.context)
        if self.reserve:
            bytes_of(self.reserve)
        if self.device != THIS:
            machine_of(self.device)


def machine_of(name: str) -> Machine:
    """A machine by name, one that `plait bench device --save` measured, or one of which only the memory is known.

    Raises: ValueError naming the nearest known one, or the file that is no such measurement.
    """
    if Path(name).suffix == PROFILE:
        return measured(Path(name))
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    if name[:1].isdecimal():
        try:
            return Machine(memory=bytes_of(name))
        except ConfigError as error:
            raise ValueError(f"device: {error}") from None
    known = [*MACHINES, THIS]
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}, or a memory such as 24GiB"
    raise ValueError(f"device={name!r} is unknown; {hint}")


def measured(path: Path) -> Machine:
    """The roofline of a machine from its measured limits: the best of reading and of products in bfloat16.

    Raises: ValueError if the file is no report of `plait bench device`.
    """
    if not path.is_file():
        raise ValueError(f"device={path} is not there; write it with plait bench device --save {path}")
    facts = [fact for fact in Report.load_jsonl(path).facts if isinstance(fact.value, int | float)]
    memory, read, products = (
        [float(str(fact.value)) for fact in facts if re.match(name, fact.name)]
        for name in ("memory$", "read", "GEMM.*BF16")
    )
    if not (memory and read and products):
        raise ValueError(f"device={path} holds no limits of a machine; write it with plait bench device --save {path}")
    return Machine(memory=int(max(memory)), bandwidth=1e9 * max(read), flops=1e9 * max(products))


def run(inputs: Inputs) -> Drawn:
    """Plan one model on one machine."""
    assert inputs.model is not None
    config, where = find_model(inputs.model)
    recipe = recipe_of(inputs.recipe or config.recipe)
    width = recipe.compute.itemsize
    machine = machine_here(width) if inputs.device == THIS else machine_of(inputs.device)
    held = weights(config, recipe)
    n = needs(
        config,
        batch=inputs.batch,
        context=config.max_context if inputs.context is None else tokens_of(inputs.context),
        width=width,
        weights=held.stored,
        read=held.read,
        piece=inputs.piece,
    )
    reserve = max(n.activations, bytes_of(inputs.reserve) if inputs.reserve else machine.reserve)
    report = Drawn(f"{config.name or where} on {inputs.device}")
    for field, value, unit in (("context", n.context, "tokens"), ("batch", n.batch, "sequences")):
        report.add(field, value, unit)
    sequences = f"{n.batch} sequence{'s' * (n.batch > 1)} of {n.context:,} tokens"
    head = Text.assemble((report.title, "bold"), f"  {where}, {recipe.name.upper()}, {sequences}")
    parts = [head, "", _memory(report, config, n, machine, reserve, inputs.piece)]
    if machine.flops is not None:
        parts += ["", _speed(report, n, machine, inputs.answer, reserve)]
    elif inputs.answer:
        raise ValueError(f"answer={inputs.answer} needs a machine's speed; name one of {', '.join(MACHINES)}, {THIS}")
    report.drawing = render(*parts)
    return report


def machine_here(width: int) -> Machine:
    """This machine, measured in half a second; width: bytes of a number that it computes with."""
    from plait.cli.machine import memory_bytes, speed

    found = speed()
    return Machine(memory=memory_bytes()[1], bandwidth=found.read, flops=found.bf16 if width == 2 else found.fp32)


def _memory(report: Drawn, config: ModelConfig, n: Needs, machine: Machine, reserve: int, piece: int) -> Table:
    attention, scan = config.pattern.count("*"), config.pattern.count("M")
    table = Table.grid(padding=(0, 2))
    rows = [
        ("weights", n.weights, f"{count(config.cost().params)} parameters"),
        ("keys and values", n.kv, f"{n.kv_per_token:,} bytes per token in {_layers(attention, 'attention')}"),
        ("states", n.states, f"{size(n.ssm + n.conv)} per sequence in {_layers(scan, 'Mamba-2')}, at any context"),
        ("activations", n.activations, f"of one piece of {min(piece, n.context * n.batch):,} tokens, about"),
    ]
    for name, value, why in rows:
        report.add(f"{name} bytes", value, "bytes")
        if value:
            table.add_row(name, size(value), why)
    most = max_batch(n, machine, reserve)
    total = n.memory - n.activations + reserve
    fits = total <= machine.memory
    report.add("total bytes", n.memory, "bytes")
    report.add("memory bytes", machine.memory, "bytes")
    report.add("reserve bytes", reserve, "bytes")
    report.add("fits", fits)
    report.add("largest batch", most, "sequences")
    verdict = f"fits in {size(machine.memory)}" if fits else f"does not fit in {size(machine.memory)}"
    table.add_row(Text("total", "bold"), size(n.memory), Text(verdict, "green" if fits else "red"))
    at_most = f"at most {most:,} sequence{'s' * (most != 1)} of this context"
    table.add_row("", "", f"{at_most}, with {size(reserve)} left free")
    if not fits and not most:
        longest = (machine.memory - n.weights - reserve - n.ssm - n.conv) // max(n.kv_per_token, 1)
        why = f"one sequence fits up to {longest:,} tokens" if longest > 0 else "the weights alone are too large"
        table.add_row("", "", why)
    return table


def _layers(n: int, kind: str) -> str:
    return f"{n} {kind} layer{'s' * (n != 1)}"


def _speed(report: Drawn, n: Needs, machine: Machine, answer: int, reserve: int) -> Table:
    assert machine.flops is not None and machine.bandwidth is not None
    table = Table.grid(padding=(0, 2))
    table.add_row("machine", f"{flops(machine.flops)}/s", f"and {machine.bandwidth / 1e9:,.0f} GB/s: no less time than")
    linear, attention, scan = n.prefill_flops()
    seconds = prefill_s(n, machine)
    report.add("prefill", seconds, "s")
    report.add("prefill FLOPs", sum(n.prefill_flops()), "FLOP")
    report.add("prefill bytes", n.prefill_bytes(), "bytes")
    share = f"{flops(linear)} in matrices, {flops(attention)} in attention, {flops(scan)} in scans"
    table.add_row("prefill", _time(seconds), f"per sequence: {share}")
    step = decode_s(n, machine)
    read, kv, states = n.decode_bytes()
    report.add("decode step", step, "s")
    report.add("decode bytes", sum(n.decode_bytes()), "bytes")
    report.add("decode FLOPs", sum(n.decode_flops()), "FLOP")
    parts = f"{size(read)} of weights, {size(kv)} of keys and values, {size(states)} of states"
    table.add_row("decode step", _time(step), f"{n.batch / step:,.0f} tokens/s: {parts}")
    if answer:
        best = rate(n, machine, answer, reserve)
        if best is None:
            table.add_row("best batch", "none", "not even one sequence fits")
            return table
        report.add("best batch", best.batch, "sequences")
        report.add("best speed", best.tokens_per_s, "tokens/s")
        report.add("best speed of decode alone", best.decode_only, "tokens/s")
        report.add("share of prefill", best.share)
        shown = f"{best.tokens_per_s:,.0f} tokens/s drawn, {answer:,} per sequence"
        table.add_row("best batch", str(best.batch), f"{shown}; {best.share:.0%} of the time is prefill")
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:,.1f} s"
