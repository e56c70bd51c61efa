"""The machine's limits: sides that return rates, and the floor that follows from them."""

import pytest
import torch

from plait.cli.benches import limits


def test_a_floor_is_the_longer_of_bytes_and_flops() -> None:
    # 600 bytes at 100 bytes/s, 80 FLOPs at 40 FLOP/s
    assert limits.floor_s(600, 80, 100, 40) == 6.0
    assert limits.floor_s(600, 800, 100, 40) == 20.0


def test_limits_are_rates_of_what_was_moved_and_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 0.25
        return clock[0]

    monkeypatch.setattr("time.perf_counter", tick)
    assert limits.read(n_bytes=4096)() == 4096 / 0.25
    assert limits.copy(n_bytes=4096)() == 4096 / 0.25
    assert limits.gemm(torch.float32, n=8)() == 2 * 8**3 / 0.25


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert limits.with_threads(1, lambda: float(torch.get_num_threads()))() == 1.0
    assert torch.get_num_threads() == before
