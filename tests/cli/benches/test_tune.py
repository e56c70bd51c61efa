"""Tuning all kernels of a model, with a GPU by name only, kernels in the interpreter, and a timer that is a table."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from plait.cli.bench import Inputs, run
from plait.cli.benches import tune
from plait.cli.benches.tune import tune_all, works
from plait.cli.drawing import Drawn
from plait.cli.launch import launch
from plait.kernels.triton import candidates, norm, tuning
from plait.model.config import ModelConfig
from plait.ops.dispatch import use
from plait.ops.norm import rms_norm

TINY = ModelConfig.from_pattern(
    "M-*-",
    name="tiny",
    vocab_size=96,
    d_model=32,
    mamba2={"n_heads": 2, "head_dim": 16, "d_state": 16, "n_groups": 1, "chunk": 16},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    mlp={"d_ff": 48},
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU by name, and the file that its winners go to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fast GPU")
    forget()
    yield tuning.cache_file()
    forget()


def forget() -> None:
    tuning._choose.cache_clear()
    tuning._measured.cache_clear()


def timer(run: Callable[[], object]) -> float:
    """Milliseconds by a table: fewer warps are faster, whatever the kernel; nothing is run."""
    assert tuning._trial is not None
    return float(tuning._trial[1]["num_warps"])


def test_what_is_tried_are_a_kernels_own_keywords_and_lengths_of_blocks_that_triton_takes() -> None:
    from plait.kernels.triton import activation, conv, decode_attention, gated_norm, loss, rope, sample, ssd, step

    assert all((activation, conv, decode_attention, gated_norm, loss, rope, sample, ssd, step))
    assert candidates.CANDIDATES.keys() <= tuning.DEFAULTS.keys()
    for kernel, default in tuning.DEFAULTS.items():
        values = candidates.values(kernel)
        assert values.keys() <= default.keys(), kernel
        for name, choices in values.items():
            assert len(set(choices)) > 1 and min(choices) > 0, kernel
            assert "stages" in name.lower() or all(n & (n - 1) == 0 for n in choices), kernel


def test_a_model_tunes_every_kernel_it_launches_and_the_file_changes_what_they_are_launched_with(gpu: Path) -> None:
    report = Drawn("tuned")
    with use("triton"):
        tune_all(report, TINY, tokens=(20,), batches=(3,), device="cpu", timers=(timer, timer))
    table = json.loads(gpu.read_text())
    # a state of 16 x 16 in bfloat16 is a small one: the rows for larger ones are another model's
    small = {kernel for kernel in candidates.CANDIDATES if not kernel.endswith(("_large", "_largest"))}
    small -= {"gate", "rotate"}
    assert {name.split()[0] for name in table} == small
    fewest = {"num_warps": 1, "BLOCK": 512, "SPAN": 64, "STAGES": 3}
    assert table["causal_conv1d D=64 L=32"] == fewest
    assert table["selective_state_update batch=4 bytes=2"]["num_warps"] == 1
    assert "causal_conv1d D=64 L=32" in report.drawing and "2.00" in report.drawing
    gains = [fact.value for fact in report.facts if fact.name.endswith(": gain")]
    assert len(gains) >= len(small) and min(gains) >= 1.0  # type: ignore[type-var,operator]


def test_what_the_file_says_is_what_a_kernel_is_launched_with(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, int]] = []

    class Noted:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **keywords: launches.append(keywords)

    monkeypatch.setattr(norm, "_forward", Noted())
    x, w = torch.randn(5, 64), torch.ones(64)
    gpu.parent.mkdir(parents=True)
    for text in (None, '{"rms_norm D=64": {"NUMBERS": 128, "num_warps": 2}}', '{"rms_norm D=64": {"NUMBERS": '):
        forget()
        if text is not None:
            gpu.write_text(text)
        with use("triton"):
            if text is None or text.endswith("}"):
                rms_norm(x, w)
            else:
                # reported, and ignored
                with pytest.warns(UserWarning, match="ignoring tuned configurations in .*delete it to tune again"):
                    rms_norm(x, w)
    shown = [(keywords["ROWS"], keywords["num_warps"]) for keywords in launches]
    assert shown == [(64, 8), (2, 2), (64, 8)]


def test_time_that_is_up_and_kernels_that_fail_are_named(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [work for work in works(TINY, (5,), (1,), "cpu") if work.name.startswith(("rms norm", "state update"))]
    monkeypatch.setattr(tune, "works", lambda *args: short)

    def failing(run: Callable[[], object]) -> float:
        raise RuntimeError("an illegal memory access")

    with use("triton"):
        late, broken = Drawn("tuned"), Drawn("tuned")
        tune_all(late, TINY, tokens=(5,), batches=(1,), device="cpu", timers=(timer, timer), seconds=0.0)
        tune_all(broken, TINY, tokens=(5,), batches=(1,), device="cpu", timers=(failing, failing))
    assert not gpu.exists()
    assert {str(fact.value) for fact in late.facts[1:-1]} == {"left out: the time was up"}
    assert all("illegal memory access" in str(fact.value) for fact in broken.facts[1:-1])


def test_what_is_tuned_first_stays_and_work_that_cannot_run_is_named(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm_of = lambda *sizes: lambda: [rms_norm(torch.randn(3, D), torch.ones(D)) for D in sizes]  # noqa: E731

    def broken() -> None:
        raise torch.OutOfMemoryError("no room for it")

    work = [("first", norm_of(64)), ("broken", broken), ("second", norm_of(64, 256))]
    monkeypatch.setattr(tune, "works", lambda *args: [tune.Work(name=name, run=run) for name, run in work])

    def turned(run: Callable[[], object]) -> float:
        """In the first work few warps are faster, in the second many."""
        tried = tuning._trial
        assert tried is not None
        return tried[1]["num_warps"] * (1 if run is work[0][1] else -1) + 100

    report = Drawn("tuned")
    with use("triton"):
        tune_all(report, TINY, tokens=(5,), batches=(1,), device="cpu", timers=(turned, turned))
    table = {name: row["num_warps"] for name, row in json.loads(gpu.read_text()).items()}
    assert table == {"rms_norm D=64": 4, "rms_norm D=256": 16}
    assert [fact.value for fact in report.facts if fact.name == "broken"] == ["FAILED: no room for it"]


def test_the_work_of_a_transformer_has_no_scan() -> None:
    config = ModelConfig.from_pattern(
        "*-",
        name="t",
        vocab_size=64,
        d_model=32,
        attention={"n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "rope": {"base": 1000.0}},
        mlp={"d_ff": 32, "gated": True, "activation": "silu"},
    )
    found = {work.name.split(",")[0]: work.run for work in works(config, (4,), (1,), "cpu")}
    assert set(found) == {"rms norm", "gate", "rotation", "cross-entropy", "decode attention", "sampling"}
    with use("triton"):
        assert tuning.asked(found["gate"]) == {"gate": ("gate",)}
        assert tuning.asked(found["rotation"]) == {"rotate": ("rotate P=16",)}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert launch(["bench", "device", "--tune"]) == 2
    assert "no NVIDIA GPU is visible here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="belongs to `plait bench device`"):
        run(Inputs(what="ops", tune=True))
