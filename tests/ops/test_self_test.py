"""The start-up test of rounding passes on a sound device, and names the fault of a broken one."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plait.ops import operand as operands
from plait.ops import self_test as module
from plait.ops.dispatch import BackendError, Op
from plait.ops.self_test import self_test

Break = Callable[[Tensor, object], Tensor]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    module._self_test.cache_clear()


def test_a_sound_device_passes_quickly_and_is_asked_once(device: str) -> None:
    self_test(device)
    begin = time.process_time()
    self_test(device)
    assert time.process_time() - begin < 0.01


def zeros_at_random(values: Tensor, seed: object) -> Tensor:
    return values if seed is None else values * 0


def down(values: Tensor, seed: object) -> Tensor:
    # always towards zero, by one part in eight: what is cut instead of rounded
    return values * 0.875 if seed is None else values


def a_little_low(values: Tensor, seed: object) -> Tensor:
    # the upper neighbour becomes the lower one in one of five cases
    low = values.abs().amin()
    mask = torch.arange(values.numel()).view(values.shape) % 5 == 0
    kept = (values.abs() > 4) | (values == 0)
    return values if seed is None else torch.where(mask & ~kept & (values.abs() > low), -2.0, values)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(zeros_at_random, "rounded at random to e2m1 must become"), (down, "halfway"), (a_little_low, "that mean within")],
)
def test_a_broken_device_is_named_with_what_was_seen(monkeypatch: pytest.MonkeyPatch, fault: Break, says: str) -> None:
    sound = operands.operand

    def broken(x: Tensor, *, seed: int | None = None, **how: object) -> tuple[Tensor, Tensor]:
        values, descale = sound(x, seed=seed, **how)  # type: ignore[arg-type]
        return fault(values, seed), descale

    monkeypatch.setattr(module, "operand", broken)
    with pytest.raises(BackendError, match=says):
        self_test("cpu")


@pytest.mark.parametrize("name", ["quantize_fp8", "quantize_mx", "quantize_nvfp4"])
def test_a_fast_path_with_one_wrong_code_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    sound = getattr(module, name)
    broken = Op(sound.reference)

    @broken.backend("native", when=lambda *a, **k: True)
    def _(x: Tensor, *args: object, **how: object) -> tuple[Tensor, ...]:
        codes, *rest = sound(x, *args, **how)
        codes.view(torch.uint8)[3, 5] ^= 1
        return codes, *rest

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(BackendError, match="1 of .* differ"):
        self_test("cpu")
