"""`plait doctor`: what works on this machine, what would make it faster, and how to get there.

Nothing is believed: matrix products are timed, and a tiny model with every kind of layer is trained and made to
generate, while the doctor watches which backend each operation takes.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

import plait.ops
from plait.cli.drawing import Drawn, count, render, size
from plait.cli.launch import arg
from plait.cli.machine import cores, cpu_features, cxx_compiler, is_crowded, memory_bytes, speed
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.ops.dispatch import Op
from plait.ops.rope import Rope

EXAMPLE = "plait doctor"

# what the test suite runs with; others may well work
TESTED_PYTHON = {(3, 11), (3, 12), (3, 13)}
TESTED_TORCH = "2.13"
OPTIONAL = {
    "transformers": "`plait demo` and the tests compare exports with it",
    "tensorboard": "training curves in a browser",
}
# what keeps a fast backend from serving, by its name; others serve special calls only
NEEDS = {"triton": "needs a CUDA device and Triton", "native": "not compiled here, or not for these tensors"}
# logits of a float32 model; rounding alone stays near 1e-6
AGREE = 1e-4
COLOUR = {"ok": "green", "hint": "yellow", "fault": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How thorough to be."""

    measure: bool = arg(default=True, help="time matrix products and memory (about a second)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at: how it stands, what was found, and what to do about it ("" where nothing is needed)."""

    subject: str
    state: Literal["ok", "hint", "fault"]
    found: str
    fix: str = ""


def run(inputs: Inputs) -> Drawn:
    """Examine the machine; raises RuntimeError, after all findings are shown, if something basic does not work."""
    findings = [*versions(), *processor(), native_kernels(), *room(), *accelerator(), *packages()]
    report = Drawn("doctor")
    if inputs.measure:
        findings += measured(report)
    findings += working_model()
    for finding in findings:
        report.add(finding.subject, f"{finding.state}: {finding.found}" + (f"; {finding.fix}" if finding.fix else ""))
    report.drawing = _draw(findings)
    faults = [finding for finding in findings if finding.state == "fault"]
    if faults:
        print(report.drawing, file=sys.stderr)
        raise RuntimeError("; ".join(f"{fault.subject}: {fault.found}; {fault.fix}" for fault in faults))
    return report


def versions() -> list[Finding]:
    """Python, PyTorch and Plait itself."""
    python, torch_version = platform.python_version(), torch.__version__
    is_known = sys.version_info[:2] in TESTED_PYTHON
    is_tested = torch_version.startswith(TESTED_TORCH + ".")
    wanted = (
        ""
        if is_tested
        else f"tests run with {TESTED_TORCH}; if something fails, try pip install torch=={TESTED_TORCH}.0"
    )
    return [
        Finding(
            subject="Python",
            state="ok" if is_known else "hint",
            found=python,
            fix="" if is_known else "tests run with 3.11 to 3.13; if something fails, try one of them",
        ),
        Finding(subject="PyTorch", state="ok" if is_tested else "hint", found=torch_version, fix=wanted),
        Finding(subject="Plait", state="ok", found=importlib.metadata.version("plait")),
    ]


def processor() -> list[Finding]:
    """Instruction sets and threads."""
    features = cpu_features()
    weak = not {"AVX2", "AVX-512", "NEON", "SVE"} & set(features)
    few = torch.get_num_threads() < cores()
    set_by = " (OMP_NUM_THREADS is set)" if "OMP_NUM_THREADS" in os.environ else ""
    return [
        Finding(
            subject="processor",
            state="hint" if weak else "ok",
            found=", ".join(features),
            fix="without AVX2 matrix products are slow; a newer machine helps" if weak else "",
        ),
        Finding(
            subject="threads",
            state="hint" if few else "ok",
            found=f"{torch.get_num_threads()} of {cores()} cores{set_by}",
            fix=f"OMP_NUM_THREADS={cores()} uses all of them" if few else "",
        ),
    ]


def native_kernels() -> Finding:
    """How many of the C++ kernels are compiled, and for which kind of processor."""
    from plait.kernels.native.library import FOLDER, library, target

    sources = sorted(path.stem for path in FOLDER.glob("*.cpp"))
    compiled = [name for name in sources if library(name) is not None]
    known = target() or "a processor that they do not know"
    whole = len(compiled) == len(sources)
    again = "install g++, then pip install Plait again: PyTorch serves until then"
    return Finding(
        subject="native kernels",
        state="ok" if whole else "hint",
        found=f"{len(compiled)} of {len(sources)} compiled for {known}",
        fix="" if whole else again if target() else "PyTorch serves, slower",
    )


def room() -> list[Finding]:
    """Memory and disk."""
    free, total = memory_bytes()
    disk = shutil.disk_usage(Path.cwd()).free
    tight, full = free < 3 << 30, disk < 5 << 30
    return [
        Finding(
            subject="memory",
            state="hint" if tight else "ok",
            found=f"{size(free)} free of {size(total)}",
            fix="close other programs; the demo needs about 3 GiB" if tight else "",
        ),
        Finding(
            subject="disk",
            state="hint" if full else "ok",
            found=f"{size(disk)} free here",
            fix="an 8 B checkpoint takes 16 GB; work on another disk" if full else "",
        ),
    ]


def accelerator() -> list[Finding]:
    """GPU, Triton and a compiler for torch.compile."""
    findings = []
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        old = properties.major < 8
        findings.append(
            Finding(
                subject="GPU",
                state="hint" if old else "ok",
                found=f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{size(properties.total_memory)}",
                fix="no fast BF16 before capability 8.0: use recipe fp32" if old else "",
            )
        )
        triton = importlib.util.find_spec("triton") is not None
        fix = "" if triton else "pip install triton"
        findings.append(Finding(subject="Triton", state="ok" if triton else "hint", found=_there(triton), fix=fix))
    else:
        built = torch.version.cuda or torch.version.hip
        fix = (
            "PyTorch is built for a GPU but finds none: look at the driver (nvidia-smi)"
            if built
            else "everything runs on the processor; with a GPU, install PyTorch's CUDA build (PLAIT_TORCH=system)"
        )
        findings.append(Finding(subject="GPU", state="hint", found="none", fix=fix))
    compiler = cxx_compiler()
    fix = "" if compiler else "torch.compile needs one on a GPU: install g++"
    findings.append(
        Finding(subject="C++", state="ok" if compiler else "hint", found=compiler or "no compiler", fix=fix)
    )
    return findings


def packages() -> list[Finding]:
    """Optional packages."""
    findings = []
    for name, purpose in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        found = importlib.metadata.version(name) if there else "not installed"
        fix = "" if there else f"{purpose}: pip install {name}"
        findings.append(Finding(subject=name, state="ok" if there else "hint", found=found, fix=fix))
    return findings


def measured(report: Drawn) -> list[Finding]:
    """Matrix products and memory, timed."""
    s = speed("cuda" if torch.cuda.is_available() else "cpu")
    for name, value, unit in (
        ("GEMM FP32", s.fp32, "FLOP/s"),
        ("GEMM BF16", s.bf16, "FLOP/s"),
        ("read", s.read, "B/s"),
    ):
        report.add(name, value, unit)
    ratio = s.bf16 / s.fp32
    verdict = f"BF16 is {ratio:.1f} times as fast" if ratio >= 1 else f"BF16 is {1 / ratio:.1f} times slower"
    crowded = is_crowded(torch.get_num_threads())
    waiting = Finding(
        subject="crowding",
        state="hint" if crowded else "ok",
        found="other programs are busy: threads wait for each other" if crowded else "the processors are free",
        fix="small models train many times faster with OMP_NUM_THREADS=1, or GOMP_SPINCOUNT=0" if crowded else "",
    )
    return [
        waiting,
        Finding(
            subject="products",
            state="ok" if s.has_fast_bf16 else "hint",
            found=f"{count(s.fp32)}FLOP/s FP32, {count(s.bf16)}FLOP/s BF16: {verdict}".replace(" BFLOP", " GFLOP"),
            fix="" if s.has_fast_bf16 else "train and generate with recipe fp32 here",
        ),
        Finding(subject="reading", state="ok", found=f"{s.read / 1e9:.1f} GB/s from memory: the limit of decoding"),
    ]


def working_model() -> list[Finding]:
    """Train a tiny model with every kind of layer, let it generate, and see which backend each operation takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with watching() as seen:
        try:
            model = build(_tiny(), "fp32", device)
            first, last = _train(model)
            difference = _generate(model)
        # whatever is wrong is the finding
        except Exception as error:
            found = f"a tiny model fails: {type(error).__name__}: {' '.join(str(error).split())}"
            return [Finding(subject="model", state="fault", found=found, fix=_REINSTALL)]
    findings = []
    learns, agrees = last < 0.9 * first, difference < AGREE
    findings.append(
        Finding(
            subject="training",
            state="ok" if learns else "fault",
            found=f"a tiny model of M * - E layers learns: loss {first:.2f} to {last:.2f}",
            fix="" if learns else f"the loss should fall. {_REINSTALL}",
        )
    )
    findings.append(
        Finding(
            subject="generation",
            state="ok" if agrees else "fault",
            found=f"token by token equals all at once within {difference:.0e}",
            fix="" if agrees else f"they should agree within {AGREE:g}. {_REINSTALL}",
        )
    )
    return findings + backends(seen)


_REINSTALL = f"install PyTorch {TESTED_TORCH} and Plait afresh; if it stays, please report it with this output"


def backends(seen: dict[str, set[str]]) -> list[Finding]:
    """For each operation with several backends: which ones ran, and why the others did not."""
    findings, plain = [], []
    for name, op in operations().items():
        if not op.candidates:
            plain.append(name)
            continue
        ran = seen.get(name, set())
        # a backend behind one that takes every call is not missed; nor is an operation that this model never calls
        first = next((i for i, (backend, _, _) in enumerate(op.candidates) if backend in ran), len(op.candidates))
        faster = dict.fromkeys(backend for backend, _, _ in op.candidates[:first] if ran)
        idle = [name for name in faster if name in NEEDS and (name != "triton" or torch.cuda.is_available())]
        if ran:
            fix = "; ".join(f"{backend}: {NEEDS[backend]}" for backend in idle)
            state = "hint" if idle else "ok"
            findings.append(Finding(subject=f"op {name}", state=state, found=", ".join(sorted(ran)), fix=fix))
    found = f"{', '.join(plain)}: PyTorch, the only backend"
    return [*findings, Finding(subject="other ops", state="ok", found=found)]


def operations() -> dict[str, Op[..., object]]:
    """All operations of plait.ops by name."""
    found: dict[str, Op[..., object]] = {}
    for module in pkgutil.iter_modules(plait.ops.__path__):
        for name, value in vars(importlib.import_module(f"plait.ops.{module.name}")).items():
            if isinstance(value, Op):
                found[name] = value
    return dict(sorted(found.items()))


@contextmanager
def watching() -> Iterator[dict[str, set[str]]]:
    """Inside the block, note for each operation which backends served its calls."""
    seen: dict[str, set[str]] = {}

    def noted(name: str, backend: str, fn: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(fn)
        def call(*args: object, **kwargs: object) -> object:
            seen.setdefault(name, set()).add(backend)
            return fn(*args, **kwargs)

        return call

    ops = operations()
    before = {name: (op.reference, list(op.candidates)) for name, op in ops.items()}
    try:
        for name, op in ops.items():
            op.reference = noted(name, "reference", op.reference)
            op.candidates = [(backend, when, noted(name, backend, fn)) for backend, when, fn in op.candidates]
        yield seen
    finally:
        for name, op in ops.items():
            op.reference, op.candidates = before[name]


def _tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        d_model=32,
        init_std=0.05,
        layers=(
            Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=2, chunk=16),
            Attention(n_heads=4, n_kv_heads=2, head_dim=8, rope=Rope(base=10000.0)),
            MLP(d_ff=64),
            MLP(d_ff=64, activation="silu", gated=True),
            MoE(n_experts=4, n_chosen=2, d_ff=32, d_shared=32),
        ),
    )


def _train(model: Hybrid) -> tuple[float, float]:
    """Loss before and after a few steps on a text that repeats itself."""
    ids = (torch.arange(48, device=model.device) % 7)[None].repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@torch.no_grad()
def _generate(model: Hybrid) -> float:
    """Largest difference of logits between greedy generation with a cache and one pass over the result."""
    ids = torch.arange(20, device=model.device)[None] % 7
    cache, logits = model.cache(1), []
    logits.append(model(ids, cache=cache).logits[:, -1:])
    for _ in range(8):
        ids = torch.cat([ids, logits[-1].argmax(-1)], 1)
        logits.append(model(ids[:, -1:], cache=cache).logits)
    whole = model(ids).logits[:, -len(logits) :]
    return float((whole - torch.cat(logits, 1)).abs().max())


def _there(is_there: bool) -> str:
    return "installed" if is_there else "not installed"


def _draw(findings: list[Finding]) -> str:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        state = Text(finding.state, COLOUR[finding.state])
        text = Text(finding.found)
        if finding.fix:
            text.append(f"\n{finding.fix}", "dim")
        table.add_row(state, finding.subject, text)
    faults, hints = (sum(f.state == state for f in findings) for state in ("fault", "hint"))
    if faults:
        last = Text(f"{faults} basic thing{'s' * (faults > 1)} not working", COLOUR["fault"])
    else:
        slower = f"; {hints} hint{'s' * (hints != 1)} above" if hints else ""
        last = Text(f"all basics work{slower}", COLOUR["ok"])
    return render(table, "", last)
