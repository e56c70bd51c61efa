"""The script that measures a GPU runs from end to end at the least sizes, and writes what it found."""

import json
import subprocess
import sys
from pathlib import Path

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
    assert len(checked) == 17
    for part in ("scan 1x32 forward and backward", "state update", "gated norm", "decode attention", "cross-entropy"):
        assert any(name.startswith((part, f"plait {part}")) for name in facts), part
    for model in ("nemotron-h-8b", "llama-3.1-8b", "qwen2.5-7b"):
        assert any(name.startswith(f"{model}, 64 in / 8 out: share of the roofline") for name in facts), model
    assert "commit" in json.loads(file.read_text().splitlines()[0])["provenance"]


def test_without_a_gpu_it_says_what_to_do() -> None:
    env = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 2
    assert "--tiny runs the same" in done.stderr


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
