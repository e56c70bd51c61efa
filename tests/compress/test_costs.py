"""Costs by layer: they add up to what the model's own arithmetic says, and the roofline's times to the plan's."""

import math
from dataclasses import replace

import pytest

from plait.compress.costs import Costs, LayerCosts, Load
from plait.compress.numbers import Numbers, layer_weights
from plait.compress.roofline import Roofline
from plait.model.config import ModelConfig
from plait.model.layers.moe import MoE
from plait.model.plan import MACHINES, Machine, decode_s, needs, prefill_s
from plait.model.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_layers_and_rest_add_up_to_the_model(name: str) -> None:
    config = ModelConfig.preset(name)
    load = Load(batch=3, context=1000, answer=24)
    found = Costs(load=load, reserve=77).total(config)
    n = needs(config, batch=3, context=1024)
    assert found.params == config.cost().params
    assert (found.kv_bytes, found.state_bytes, found.reserve_bytes) == (n.kv, n.states, 77)
    assert found.total_bytes == found.weight_bytes + n.kv + n.states + 77
    assert math.isnan(found.decode_s) and math.isnan(found.prefill_s)


@pytest.mark.parametrize("machine", ["h200", "rtx4090", "a10g"])
@pytest.mark.parametrize("name", ["nemotron-nano-9b-v2", "qwen2.5-7b", "nemotron-h-47b"])
def test_the_roofline_agrees_with_the_plan_of_the_whole_model(name: str, machine: str) -> None:
    # times of layers may exceed the whole's by little: a layer's norm is read, and each takes the larger of two bounds
    config, at = ModelConfig.preset(name), MACHINES[machine]
    for context, batch in ((8192, 1), (65536, 1), (8192, 4)):
        n = needs(config, batch=batch, context=context)
        found = Costs(load=Load(batch=batch, context=context), clock=Roofline(machine=at)).total(config)
        assert found.decode_s == pytest.approx(decode_s(n, at), rel=1e-3)
        assert found.prefill_s == pytest.approx(batch * prefill_s(n, at), rel=5e-3)


def test_a_step_is_counted_at_the_middle_of_the_answer() -> None:
    clock = Roofline(machine=MACHINES["h100"])
    spec = ModelConfig.preset("nemotron-h-8b").layers[7]
    middle = Costs(load=Load(context=1500), clock=clock).layer(spec, 4096).decode_s
    assert Costs(load=Load(context=1000, answer=1000), clock=clock).layer(spec, 4096).decode_s == middle


def test_few_bits_are_read_faster_and_wider_caches_slower() -> None:
    config, clock = ModelConfig.preset("nemotron-h-8b"), Roofline(machine=MACHINES["h100"])
    costs = Costs(load=Load(context=65536), clock=clock)
    plain = costs.total(config)
    few = replace(costs, numbers=Numbers(weights="nvfp4")).total(config)
    narrow = replace(costs, numbers=Numbers(kv="fp8", ssm="bf16")).total(config)
    head = (131072 * 4096 * 2 * 2 - 4096 * 2) / 3.35e12
    assert few.decode_s < plain.decode_s / 2 and few.decode_s > head / 2
    assert narrow.kv_bytes == plain.kv_bytes / 2
    assert plain.decode_s - narrow.decode_s == pytest.approx((2**29 + 24 * 4 * 2**20) / 3.35e12, rel=1e-6)


def test_a_machine_of_which_only_the_memory_is_known_tells_no_time() -> None:
    costs = Costs(clock=Roofline(machine=Machine(memory=2**34)))
    with pytest.raises(ValueError, match="speed is not known"):
        costs.total(ModelConfig.preset("nemotron-h-4b"))


def test_costs_add_field_by_field() -> None:
    a = LayerCosts(params=1, weight_bytes=2, kv_bytes=3, state_bytes=4, reserve_bytes=5, prefill_s=6, decode_s=7)
    assert a + a + LayerCosts() == LayerCosts(
        params=2, weight_bytes=4, kv_bytes=6, state_bytes=8, reserve_bytes=10, prefill_s=12, decode_s=14
    )


@pytest.mark.parametrize("field", ["batch", "context"])
@pytest.mark.parametrize("value", [0, 1.5, "8k"])
def test_a_load_of_nothing_or_of_no_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be a whole number, at least 1"):
        Load(**{field: value})  # type: ignore[arg-type]


def test_many_tokens_read_more_experts_than_one() -> None:
    spec = MoE(n_experts=128, n_chosen=6, d_ff=1856)
    clock, width = Roofline(machine=Machine(memory=2**40, bandwidth=1e12, flops=1e30)), 2688
    expert = 2 * 1856 * width * 2 / 1e12

    def read(load: Load) -> tuple[float, ...]:
        """Experts whose bytes are read, in prefill and in a step."""
        rest = layer_weights(spec, width).read - 6 * expert * 1e12
        return tuple((seconds - rest / 1e12) / expert for seconds in clock.layer(spec, width, load, Numbers()))

    assert read(Load(context=1)) == pytest.approx((6, 6), rel=1e-6)
    # drawn by hand: 128 (1 - (122 / 128)^n), and all of them by a piece
    assert read(Load(batch=2, context=1)) == pytest.approx((11.71875, 11.71875), rel=1e-6)
    assert read(Load(batch=64, context=2048))[1] == pytest.approx(128 * (1 - (122 / 128) ** 64), rel=1e-6)
    assert read(Load(context=2048))[0] == pytest.approx(128, rel=1e-6)
