"""The limits of a machine: what is measured is a machine for those that plan."""

from pathlib import Path

import pytest
import torch

from plait.cli.bench import Inputs
from plait.cli.benches import device, limits
from plait.cli.machine import memory_bytes
from plait.cli.plan import machine_of
from plait.model.plan import Machine
from plait.report import Report


def test_measured_limits_are_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "read", lambda at: lambda: 5e9)
    monkeypatch.setattr(limits, "copy", lambda at: lambda: 9e9)
    monkeypatch.setattr(limits, "gemm", lambda dtype, n, at: lambda: n * (2e9 if dtype == torch.bfloat16 else 3e9))
    path = tmp_path / "limits.jsonl"
    report = device.measure(Inputs(what="device", rounds=1))
    report.save_jsonl(path)
    # the largest product's
    largest = device.SIZES[-1] if not torch.cuda.is_available() else 8192
    told = next(fact.value for fact in report.facts if fact.name == "memory")
    assert machine_of(str(path)) == Machine(memory=told, bandwidth=5e9, flops=largest * 2e9)  # type: ignore[arg-type]
    assert torch.cuda.is_available() or told == memory_bytes()[1]


def test_a_file_that_holds_no_limits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl is not there; write it with plait bench device --save"):
        machine_of(str(tmp_path / "none.jsonl"))
    report = Report("other")
    report.add("memory", 3)
    report.save_jsonl(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="holds no limits of a machine"):
        machine_of(str(tmp_path / "other.jsonl"))
