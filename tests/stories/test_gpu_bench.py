"""The script that measures a GPU runs from end to end at the least sizes, and writes what it found."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from plait.report import Report

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"


def test_every_part_runs_at_tiny_sizes_and_every_kernel_is_right(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    command = [str(SCRIPT), "--tiniest", "--json", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = {fact.name: fact.value for fact in Report.load_jsonl(file).facts}
    assert not [name for name, value in facts.items() if str(value).startswith(("NO", "FAILED", "left out"))]
    checked = [name for name, value in facts.items() if name.startswith("correct: ") and value == "yes"]
    assert len(checked) == 20
    timed = ("scan 1x32 forward and backward", "state update", "gated norm 1x32 backward", "convolution 1x32 backward")
    for part in (*timed, "decode attention", "cross-entropy"):
        assert any(name.startswith((part, f"plait {part}")) for name in facts), part
    assert any(name.startswith("ssd_gradients") and name.endswith("gain") for name in facts)
    for model in ("nemotron-h-8b", "llama-3.1-8b", "qwen2.5-7b"):
        assert any(name.startswith(f"{model}, 64 in / 8 out: share of the roofline") for name in facts), model
        assert facts[f"{model}, 64 in / 8 out: drawn is"] == "end to end by the engine"
    assert "commit" in json.loads(file.read_text().splitlines()[0])["provenance"]


def test_without_a_gpu_it_says_what_to_do() -> None:
    env = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 2
    assert "--tiny runs the same" in done.stderr


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script's own main file, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent / "gpu"))
    spec = importlib.util.spec_from_file_location("gpu_bench", SCRIPT.parent / "gpu" / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_crashes_or_hangs_leaves_its_figures_and_the_others(gpu_bench: ModuleType) -> None:
    import clock
    import setting

    def found(bench: clock.Bench) -> None:
        bench.report.add("before", 1.0)

    def crash(bench: clock.Bench) -> None:
        found(bench)
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(bench: clock.Bench) -> None:
        found(bench)
        time.sleep(60)

    def fail(bench: clock.Bench) -> None:
        found(bench)
        raise RuntimeError(f"out of memory after {bench.value('first'):.0f}")

    for part, seconds, problem in (
        (found, 20.0, ""),
        (crash, 20.0, f"the process ended with -{signal.SIGKILL.value}"),
        (hang, 1.0, "ended after 1 s"),
        (fail, 20.0, "RuntimeError: out of memory after 7"),
    ):
        bench = clock.Bench(setting.tiny(True), Report("parts", provenance={"commit": "abc"}))
        bench.report.add("first", 7.0)
        assert gpu_bench.alone(part, bench, seconds) == problem
        assert [(fact.name, fact.value) for fact in bench.report.facts] == [("first", 7.0), ("before", 1.0)]
        assert bench.report.provenance == {"commit": "abc"}


def test_a_long_prompt_for_which_the_time_is_short_is_composed_and_says_so(
    gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clock
    import models
    import setting

    bench = clock.Bench(setting.tiny(True), Report("parts"), bandwidth=1e9, peak=1e9, end=time.monotonic() + 5)
    models.long_prompts(bench, "nemotron-h-8b")
    facts = {fact.name.removeprefix("nemotron-h-8b, 64 in / 8 out: "): fact.value for fact in bench.report.facts}
    assert "left out: it would take" in str(facts["end to end by the engine"])
    assert facts["drawn is"] == "composed of one prompt and one step" and facts["batch"] == 3
    assert facts["drawn"] == facts["drawn, composed of one prompt and one step"]


def test_a_kernel_that_does_not_compile_is_named_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.errors import TritonError

    monkeypatch.syspath_prepend(str(SCRIPT.parent / "gpu"))
    import clock
    import correct
    import setting

    def broken(inputs: object) -> None:
        raise TritonError("out of resource: shared memory")

    cases = [("a", broken, {}), ("b", lambda inputs: [torch.ones(1)], {})]
    monkeypatch.setattr(correct, "cases", lambda bench: cases)
    monkeypatch.setattr(correct, "sampling", lambda bench: "yes")
    report = Report("kernels")
    correct.check(clock.Bench(setting.tiny(True), report))
    facts = {fact.name: fact.value for fact in report.facts}
    assert facts["correct: a"] == "NO: TritonError: out of resource: shared memory" and facts["correct: b"] == "yes"
