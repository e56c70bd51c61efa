"""`plait plan`: the arithmetic of a million tokens, other recipes and machines, and errors that help."""

import json
from pathlib import Path

import pytest
import torch
from tests.model.sizes import config

from plait.cli.launch import launch
from plait.cli.plan import Inputs, machine_of, run
from plait.formats.checkpoint import save
from plait.model.hybrid import build
from plait.model.plan import GIB
from plait.report import Report


def _facts(report: Report) -> dict[str, object]:
    return {fact.name: fact.value for fact in report.facts}


def test_a_million_tokens_of_the_8b_fit_beside_its_weights() -> None:
    report = run(Inputs(model="nemotron-h-8b", context="1000000"))
    facts, drawing = _facts(report), report.table()
    assert facts["keys and values bytes"] == 16384 * 1_000_000
    assert facts["fits"] is True and facts["largest batch"] == 7
    assert 30 * GIB < float(str(facts["total bytes"])) < 31 * GIB
    for shown in ("15.09 GiB", "15.26 GiB", "4 attention layers", "24 Mamba-2 layers", "one piece of 2,048 tokens"):
        assert shown in drawing
    assert "\x1b" not in drawing


def test_the_best_batch_is_that_of_the_roofline_table() -> None:
    facts = _facts(run(Inputs(model="llama-3.1-8b", context="64k", answer=1024)))
    assert facts["best batch"] == 15 and round(float(str(facts["best speed"]))) == 221


def test_codes_need_less_and_decode_faster() -> None:
    plain, codes = (
        _facts(run(Inputs(model="nemotron-h-8b", context="8k", recipe=name, device="a10g"))) for name in (None, "int4")
    )
    assert float(str(codes["weights bytes"])) < 0.4 * float(str(plain["weights bytes"]))
    assert float(str(codes["decode step"])) < 0.4 * float(str(plain["decode step"]))
    assert float(str(codes["largest batch"])) > float(str(plain["largest batch"]))


def test_a_memory_alone_says_what_fits_and_nothing_of_speed() -> None:
    report = run(Inputs(model="nemotron-h-8b", context="1m", device="24GiB"))
    facts, drawing = _facts(report), report.table()
    assert facts["fits"] is False and facts["largest batch"] == 0
    assert "does not fit in 24 GiB" in drawing and "one sequence fits up to" in drawing and "decode" not in drawing
    longest = int(drawing.split("fits up to ")[1].split(" tokens")[0].replace(",", ""))
    assert _facts(run(Inputs(model="nemotron-h-8b", context=str(longest), device="24GiB")))["fits"] is True
    assert _facts(run(Inputs(model="nemotron-h-8b", context=str(longest + 1), device="24GiB")))["fits"] is False


def test_weights_that_are_too_large_are_named() -> None:
    assert "the weights alone are too large" in run(Inputs(model="qwen2.5-72b", device="24GiB")).table()


def test_a_checkpoint_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.cli import machine

    monkeypatch.setattr(machine, "speed", lambda: machine.Speed(fp32=1e11, bf16=2e11, read=1e10))
    monkeypatch.setattr(machine, "memory_bytes", lambda: (GIB, 2 * GIB))
    with torch.no_grad():
        save(build(config("M-*"), recipe="bf16"), tmp_path / "model")
    facts = _facts(run(Inputs(model=str(tmp_path / "model"), context="100", batch=3, device="this")))
    assert facts["memory bytes"] == 2 * GIB and facts["fits"] is True
    assert float(str(facts["decode step"])) > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nemotron-h-8b", "--device", "h20"], "device='h20' is unknown; did you mean h200?"),
        (["nemotron-h-8b", "--device", "toaster"], "rtx4090, a10g, this, or a memory such as 24GiB"),
        (["nemotron-h-8b", "--device", "24 parsecs"], "is not a size in bytes"),
        (["nemotron-h-8b", "--recipe", "int5"], "did you mean"),
        (["nemotron-h-9b"], "did you mean nemotron-h-8b"),
        (["nemotron-h-8b", "--batch", "0"], "batch=0: must be at least 1"),
        (["nemotron-h-8b", "--context", "many"], "context='many': write a number of tokens"),
        (["nemotron-h-8b", "--device", "24GiB", "--answer", "5"], "needs a machine's speed"),
        ([], "which model?"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(["plan", *words]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


def test_json_is_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["plan", "nemotron-h-8b", "--context", "1m", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"fits", "prefill", "decode step", "total bytes"} <= {fact["name"] for fact in report["facts"]}


def test_machines_are_known_in_any_case() -> None:
    assert machine_of("H200").memory == 139 * GIB
    assert machine_of("1.5GiB").memory == 3 * GIB // 2
