"""How configurations are chosen: defaults, the cache on disk, and what tuning keeps, with a fake timer and GPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from plait.kernels.triton import tuning


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One kernel in the table, an empty cache directory, and a GPU by name."""
    monkeypatch.setattr(tuning, "DEFAULTS", {"sum": {"BLOCK": 64, "num_warps": 4}})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fast GPU (80 GB)")
    _forget()
    yield
    _forget()


def _forget() -> None:
    tuning._choose.cache_clear()
    tuning._measured.cache_clear()


def _rows(*blocks: int) -> dict[str, tuple[int, ...]]:
    return {"BLOCK": blocks}


def _timer(times: dict[int, float]) -> Callable[[Callable[[], object]], float]:
    """Runs the operation, which returns its block size, and looks its time up."""

    def timer(run: Callable[[], object]) -> float:
        block = run()
        if block not in times:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return times[block]  # type: ignore[index]

    return timer


def _run(D: int) -> Callable[[], int]:
    return lambda: tuning.config("sum", D=D)["BLOCK"]


def test_without_measurements_the_table_serves() -> None:
    assert tuning.config("sum", D=4096) == {"BLOCK": 64, "num_warps": 4}


def test_the_fastest_candidate_is_kept_for_its_class_of_shapes_across_processes() -> None:
    won = tuning.tune("sum", _rows(128, 256, 512), _run(3000), timer=_timer({64: 3.0, 128: 1.0, 256: 2.0}))
    assert won.config["BLOCK"] == 128 and (won.default_ms, won.best_ms) == (3.0, 1.0)
    _forget()  # as a new process would
    assert [tuning.config("sum", D=D)["BLOCK"] for D in (2048, 2049, 4096, 4097)] == [64, 128, 128, 64]
    # a second class is added to the first
    tuning.tune("sum", _rows(256), _run(64), timer=_timer({64: 3.0, 256: 1.0}))
    assert [tuning.config("sum", D=D)["BLOCK"] for D in (64, 4096)] == [256, 128]


def test_another_gpu_keeps_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.tune("sum", _rows(128), _run(64), timer=_timer({64: 2.0, 128: 1.0}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Slow GPU")
    _forget()
    assert tuning.config("sum", D=64)["BLOCK"] == 64


def test_without_a_gpu_the_table_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.tune("sum", _rows(128), _run(64), timer=_timer({64: 2.0, 128: 1.0}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.config("sum", D=64)["BLOCK"] == 64


@pytest.mark.parametrize("text", ["{", "[1]", '{"sum D=64": {"BLOCK": "x", "num_warps": 1}}', '{"sum D=64": 3}'])
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(text: str) -> None:
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text(text)
    with pytest.warns(UserWarning, match="ignoring tuned configurations"):
        assert tuning.config("sum", D=64)["BLOCK"] == 64
    with pytest.warns(UserWarning, match="ignoring tuned configurations"):
        tuning.tune("sum", _rows(128), _run(64), timer=_timer({64: 2.0, 128: 1.0}))
    assert json.loads(tuning.cache_file().read_text()) == {"sum D=64": {"BLOCK": 128, "num_warps": 4}}
    assert [path.name for path in tuning.cache_file().parent.iterdir()] == [tuning.cache_file().name]


def test_a_row_with_names_of_another_version_is_not_used() -> None:
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text('{"sum D=64": {"TILE": 128, "num_warps": 4}}')
    assert tuning.config("sum", D=64)["BLOCK"] == 64


def test_a_directory_that_cannot_be_written_costs_only_the_choice(tmp_path: Path) -> None:
    (tmp_path / "plait").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot write"), pytest.warns(UserWarning, match="ignoring"):
        best = tuning.tune("sum", _rows(128), _run(64), timer=_timer({64: 2.0, 128: 1.0}))
    assert best.config["BLOCK"] == 128


def test_keywords_are_tried_one_after_the_other_and_the_default_stays_unless_beaten_clearly() -> None:
    tried = []

    def timer(run: Callable[[], object]) -> float:
        c = run()
        assert isinstance(c, dict)
        tried.append((c["BLOCK"], c["num_warps"]))
        return {(64, 4): 1.0, (128, 4): 0.99, (256, 4): 0.8, (256, 8): 0.7}.get(tried[-1], 2.0)

    run = lambda: tuning.config("sum", D=64)  # noqa: E731
    assert tuning.tune("sum", {"BLOCK": (64, 128)}, run, timer=timer).config["BLOCK"] == 64
    tried.clear()
    won = tuning.tune("sum", {"BLOCK": (128, 256), "num_warps": (2, 4, 8)}, run, timer=timer)
    assert tried == [(64, 4), (128, 4), (256, 4), (256, 2), (256, 8)]
    assert won.config == {"BLOCK": 256, "num_warps": 8} and won.classes == ("sum D=64",)


def test_a_default_that_does_not_fit_is_replaced_and_one_that_is_broken_is_seen() -> None:
    won = tuning.tune("sum", _rows(32), _run(64), timer=_timer({32: 2.0}))
    assert won.config["BLOCK"] == 32 and won.default_ms == float("inf")

    def broken(run: Callable[[], object]) -> float:
        if run() != 64:
            raise RuntimeError("PassManager::run failed")
        return 1.0

    assert tuning.tune("sum", _rows(32), _run(64), timer=broken).config["BLOCK"] == 64
    with pytest.raises(RuntimeError, match="PassManager"):
        tuning.tune("sum", _rows(32), _run(64), timer=lambda run: broken(lambda: 0))


def test_mistakes_are_named_and_leave_no_trial_behind() -> None:
    with pytest.raises(ValueError, match="no keyword 'TILE' to try; it has BLOCK, num_warps"):
        tuning.tune("sum", {"TILE": (1,)}, _run(64), timer=_timer({64: 1.0}))
    with pytest.raises(ValueError, match="never asks for the configuration of 'sum'"):
        tuning.tune("sum", {}, lambda: None, timer=lambda run: 1.0)
    with pytest.raises(ValueError, match="no candidate for 'sum'"):
        tuning.tune("sum", _rows(128), _run(64), timer=_timer({}))
    with pytest.raises(ZeroDivisionError):
        tuning.tune("sum", {}, lambda: 1 // 0, timer=lambda run: run())  # type: ignore[arg-type,return-value]
    assert tuning.config("sum", D=64)["BLOCK"] == 64
