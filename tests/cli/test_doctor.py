"""`plait doctor`: what it says must be so, and what is broken must be seen."""

import json

import pytest
import torch

from plait.cli import doctor
from plait.cli.doctor import Inputs, backends, operations, run, watching, working_model
from plait.cli.launch import launch
from plait.cli.machine import Threads, cpu_features, is_crowded, memory_bytes, speed
from plait.ops.dispatch import use
from plait.ops.moe import route
from plait.ops.ssd import selective_state_update, ssd


def test_a_healthy_machine_gets_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["doctor", "--no-measure"]) == 0
    shown = capsys.readouterr().out
    assert "all basics work" in shown and ("native" in shown or "chunked" in shown) and torch.__version__ in shown


def test_the_backend_that_ran_is_named_for_every_operation() -> None:
    with watching() as seen, use("reference"):
        route(torch.zeros(1, 4), torch.zeros(4), n_chosen=2)
    assert seen == {"route": {"reference"}}
    working = {finding.subject: finding.found for finding in working_model()}
    assert working["op ssd"] in ("native", "chunked")
    named = working["other ops"].split(":")[0].split(", ")
    assert set(named) | {name[3:] for name in working if name.startswith("op ")} <= set(operations())
    assert {"op ssd", "op rms_norm", "op attention", "op linear_cross_entropy"} <= set(working)


def test_watching_leaves_operations_as_they_were() -> None:
    before = (ssd.reference, list(ssd.candidates))
    with watching():
        assert ssd.reference is not before[0]
    assert (ssd.reference, ssd.candidates) == before


def test_a_faster_backend_that_did_not_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "candidates", [("native", lambda *a, **k: False, ssd.reference), *ssd.candidates])
    finding = next(f for f in backends({"ssd": {"chunked"}}) if f.subject == "op ssd")
    assert finding.found == "chunked" and finding.state == "hint" and "compiled" in finding.fix


def test_generation_that_disagrees_with_the_model_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selective_state_update.reference
    monkeypatch.setattr(selective_state_update, "candidates", [])
    monkeypatch.setattr(selective_state_update, "reference", lambda *a, **k: right(*a, **k) * 3.0)
    assert launch(["doctor", "--no-measure"]) == 1
    said = capsys.readouterr().err
    assert "generation" in said and "fault" in said


def test_a_model_that_cannot_run_is_a_fault_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("no such kernel")

    monkeypatch.setattr(doctor, "build", broken)
    (finding,) = working_model()
    assert finding.state == "fault" and "no such kernel" in finding.found


def test_measured_speeds_are_plausible() -> None:
    s = speed()
    assert 1e9 < s.fp32 < 1e15 and 1e8 < s.bf16 < 1e16 and 1e8 < s.read < 1e13
    assert s.has_fast_bf16 == (s.bf16 >= 1.2 * s.fp32)


def test_the_machine_is_described() -> None:
    free, total = memory_bytes()
    assert 0 < free <= total
    assert cpu_features() and all(cpu_features())


def test_json_holds_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["doctor", "--no-measure", "--json"]) == 0
    facts = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out.splitlines()[-1])["facts"]}
    assert facts["Python"].startswith("ok") and facts["generation"].startswith("ok")
    assert run(Inputs(measure=False)).facts


def test_threads_give_way_while_others_are_busy_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Threads() as threads:
            monkeypatch.setattr("plait.cli.machine.is_crowded", lambda n: n == 2)
            assert threads.choose() == 1 == torch.get_num_threads() and threads.was_crowded
            monkeypatch.setattr("plait.cli.machine.is_crowded", lambda n: False)
            assert threads.choose() == 2 and threads.was_crowded
            threads.choose()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_thread_is_never_crowded() -> None:
    assert not is_crowded(1)
