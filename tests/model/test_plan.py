"""Arithmetic of memory and speed, against tables that were computed by hand from the same shapes."""

import itertools
import statistics
from dataclasses import replace
from functools import cache

import pytest

from plait.compress.numbers import layer_weights
from plait.model.config import ModelConfig
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE
from plait.model.plan import GIB, MACHINES, Machine, Needs, decode_s, max_batch, needs, prefill_s, rate

MIB = 2**20
H200 = MACHINES["h200"]
K8, K64, K128 = 8192, 65536, 131072

# weights GiB, KV bytes per token, SSM MiB, conv MiB, largest batch at 8k, 64k, 128k
MEMORY = {
    "nemotron-h-8b": (15.1, 16384, 96, 1.4, 553, 111, 58),
    "nemotron-h-47b": (87.2, 20480, 720, 5.3, 57, 25, 15),
    "nemotron-h-56b": (104.9, 40960, 864, 6.3, 27, 9, 5),
    "nemotron-nano-9b-v2": (16.6, 16384, 135, 1.9, 465, 106, 56),
    "nemotron-nano-12b-v2": (22.9, 24576, 140, 2.0, 349, 69, 36),
    "qwen2.5-7b": (14.2, 57344, 0, 0.0, 280, 35, 17),
    "qwen2.5-72b": (135.4, 327680, 0, 0.0, 0, 0, 0),
    "llama-3.1-8b": (15.0, 131072, 0, 0.0, 122, 15, 7),
    "llama-3.1-70b": (131.4, 327680, 0, 0.0, 2, 0, 0),
    "qwen3-8b": (15.3, 147456, 0, 0.0, 108, 13, 6),
}
# TFLOP of reading 8k tokens; 64k: matrices, attention, scan; ms at least for 64k
PREFILL = {
    "nemotron-h-8b": (119, 921, 141, 10, 1357),
    "nemotron-h-47b": (745, 5852, 352, 63, 7933),
    "nemotron-h-56b": (908, 7101, 704, 76, 9976),
    "nemotron-nano-9b-v2": (131, 1011, 176, 14, 1521),
    "nemotron-nano-12b-v2": (186, 1438, 264, 15, 2173),
    "qwen2.5-7b": (120, 855, 862, 0, 2174),
    "qwen2.5-72b": (1238, 9203, 5629, 0, 18776),
    "llama-3.1-8b": (132, 915, 1126, 0, 2583),
    "llama-3.1-70b": (1209, 8972, 5629, 0, 18483),
    "qwen3-8b": (134, 910, 1267, 0, 2756),
}
# context, batch: GB of matrices, KV, states; GFLOP; ms at least
DECODE = {
    "nemotron-h-8b": {
        (K8, 1): (15.1, 0.1, 0.2, 16, 3.22),
        (K8, 8): (15.1, 1.1, 1.6, 127, 3.72),
        (K8, 64): (15.1, 8.6, 13.1, 1012, 7.66),
        (K8, 256): (15.1, 34.4, 52.3, 4049, 22.96),
        (K64, 1): (15.1, 1.1, 0.2, 20, 3.42),
        (K64, 8): (15.1, 8.6, 1.6, 157, 5.28),
        (K64, 64): (15.1, 68.7, 13.1, 1253, 20.19),
    },
    "nemotron-h-47b": {(K8, 8): (91.4, 1.3, 12.2, 751, 21.86), (K64, 8): (91.4, 10.7, 12.2, 826, 23.82)},
    "nemotron-h-56b": {(K64, 1): (110.5, 2.7, 1.8, 133, 23.96), (K64, 8): (110.5, 21.5, 14.6, 1067, 30.54)},
    "nemotron-nano-9b-v2": {(K8, 256): (16.6, 34.4, 73.5, 4476, 27.85), (K64, 64): (16.6, 68.7, 18.4, 1420, 21.60)},
    "nemotron-nano-12b-v2": {(K8, 256): (23.3, 51.5, 76.2, 6273, 34.16), (K64, 64): (23.3, 103.1, 19.1, 2019, 30.29)},
    "qwen2.5-7b": {(K8, 256): (14.1, 120.3, 0, 4462, 29.64), (K64, 8): (14.1, 30.1, 0, 324, 9.21)},
    "llama-3.1-8b": {(K8, 64): (15.0, 68.7, 0, 1236, 17.44), (K64, 8): (15.0, 68.7, 0, 395, 17.44)},
    "llama-3.1-70b": {(K8, 1): (139.0, 2.7, 0, 160, 29.52)},
    "qwen3-8b": {(K8, 64): (15.1, 77.3, 0, 1278, 19.26), (K64, 8): (15.1, 77.3, 0, 430, 19.26)},
}
# (read, drawn) -> batch, tokens/s, of decode alone, percent of the time that is prefill
RATES = {
    "nemotron-h-8b": {
        (K64, 1024): (109, 616, 3368, 82),
        (K8, 16384): (259, 7887, 8501, 7),
        (1024, K8): (517, 12279, 12629, 3),
    },
    "nemotron-h-56b": {(K64, 1024): (9, 76, 286, 74)},
    "nemotron-nano-9b-v2": {(K64, 1024): (104, 554, 3140, 82), (1024, K8): (439, 9922, 10173, 2)},
    "qwen2.5-7b": {(K64, 1024): (34, 333, 1142, 71), (K8, 16384): (93, 4225, 4397, 4)},
    "llama-3.1-8b": {(K64, 1024): (15, 221, 497, 56), (32768, 1024): (29, 518, 984, 47)},
    "qwen3-8b": {(1024, K8): (96, 5198, 5259, 1)},
}
# a machine's name, its reserve: the same for it
ELSEWHERE = {
    ("h100", "nemotron-h-8b", K64, 1024, 2): (55, 537, 2145, 75),
    ("h100", "qwen2.5-7b", K8, 16384, 2): (47, 2631, 2701, 3),
    ("a10g", "nemotron-nano-9b-v2", K8, 16384, 2): (6, 177, 181, 2),
    ("a10g", "nemotron-nano-9b-v2", K8, 16384, 1): (8, 222, 228, 3),
    ("a10g", "qwen3-8b", 1024, K8, 1): (4, 132, 132, 0),
}


@cache
def _needs(name: str, context: int, batch: int = 1) -> Needs:
    found = needs(ModelConfig.preset(name), batch=batch, context=context)
    # the tables count the W - 1 inputs that a convolution needs; our window keeps W
    return replace(found, conv=found.conv * 3 // 4)


def _rounds_to(value: float, shown: float, digits: int = 0) -> bool:
    return abs(value - shown) <= 0.5 * 10**-digits * (1 + 1e-6)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_that_of_the_table(name: str) -> None:
    gib, kv, ssm, conv, *batches = MEMORY[name]
    n = _needs(name, K8)
    assert _rounds_to(n.weights / GIB, gib, 1)
    assert n.kv_per_token == kv
    assert n.ssm == ssm * MIB
    assert _rounds_to(n.conv / MIB, conv, 1)
    assert [max_batch(n.at(context=context), H200) for context in (K8, K64, K128)] == batches


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_is_that_of_the_table(name: str) -> None:
    at_8k, linear, attention, scan, ms = PREFILL[name]
    n = _needs(name, K64)
    assert _rounds_to(sum(n.at(context=K8).prefill_flops()) / 1e12, at_8k)
    assert all(_rounds_to(f / 1e12, t) for f, t in zip(n.prefill_flops(), (linear, attention, scan), strict=True))
    assert _rounds_to(prefill_s(n, H200) * 1e3, ms)


@pytest.mark.parametrize("name", DECODE)
def test_decode_is_that_of_the_table(name: str) -> None:
    for (context, batch), (*gb, gflop, ms) in DECODE[name].items():
        n = _needs(name, context, batch)
        assert all(_rounds_to(b / 1e9, t, 1) for b, t in zip(n.decode_bytes(), gb, strict=True))
        assert _rounds_to(sum(n.decode_flops()) / 1e9, gflop)
        assert _rounds_to(decode_s(n, H200) * 1e3, ms, 2)


@pytest.mark.parametrize("name", RATES)
def test_rates_are_those_of_the_table(name: str) -> None:
    for (read, drawn), shown in RATES[name].items():
        found = rate(_needs(name, read), H200, drawn)
        assert found is not None
        assert (found.batch, round(found.tokens_per_s), round(found.decode_only), round(found.share * 100)) == shown


@pytest.mark.parametrize("case", ELSEWHERE, ids=lambda case: f"{case[1]} on {case[0]}, {case[4]} GiB")
def test_rates_of_other_machines_are_those_of_the_table(case: tuple[str, str, int, int, int]) -> None:
    machine, name, read, drawn, reserve = case
    found = rate(_needs(name, read), MACHINES[machine], drawn, reserve * GIB)
    assert found is not None
    shown = (found.batch, round(found.tokens_per_s), round(found.decode_only), round(found.share * 100))
    assert shown == ELSEWHERE[case]


def test_what_does_not_fit_has_no_rate() -> None:
    assert rate(_needs("qwen2.5-72b", K64), H200, 1024) is None
    assert max_batch(_needs("nemotron-h-8b", K8), Machine(memory=GIB)) == 0


def test_a_million_tokens_need_weights_keys_of_four_layers_one_state_and_one_piece() -> None:
    n = needs(ModelConfig.preset("nemotron-h-8b"), batch=1, context=1_000_000)
    assert ModelConfig.preset("nemotron-h-8b").pattern.count("*") == 4
    # 2 bytes x keys and values x 8 heads of 128 x 4 layers
    assert n.kv == 2 * 2 * 8 * 128 * 4 * 1_000_000
    assert n.states == 24 * (128 * 64 * 128 * 4 + (8192 + 2 * 8 * 128) * 4 * 2)
    assert n.memory == n.weights + n.kv + n.states + n.activations
    # stream and norm; the widest layer's projection, the convolution's input and result, the scan's and the norm's
    assert n.activations == 2048 * 2 * (2 * 4096 + 18560 + 2 * 10240 + 2 * 8192)
    assert n.activations == n.at(context=10_000_000).activations < 0.3 * GIB
    assert n.memory < 31 * GIB


def test_a_size_without_speed_says_so() -> None:
    with pytest.raises(ValueError, match="name a machine"):
        decode_s(_needs("nemotron-h-8b", K8), Machine(memory=24 * GIB))


def test_experts_are_read_by_all_tokens_of_a_batch() -> None:
    spec, batch = MoE(n_experts=8, n_chosen=2, d_ff=48), 3
    config = ModelConfig(vocab_size=64, d_model=32, layers=(spec, MLP(d_ff=64), spec))
    n = needs(config, batch=batch, context=1000)
    expert = 2 * 2 * 32 * 48
    # of 8 experts, each token chooses 2 of 28 pairs: those that are chosen by none of 3 tokens, counted one by one
    pairs = list(itertools.combinations(range(8), 2))
    unions = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, repeat=3)]
    more = 2 * expert * (statistics.fmean(unions) - 2)
    assert n.decode_bytes()[0] == pytest.approx(n.at(batch=1).decode_bytes()[0] + more)
    assert n.prefill_bytes() == pytest.approx(n.read + 2 * 6 * expert + n.kv_per_token * 500)
    # as the costs of compression have it
    cost = [layer_weights(spec, 32, "bf16", tokens).read for tokens in (1, batch)]
    assert n.reading(batch) - n.reading(1) == pytest.approx(2 * (cost[1] - cost[0]))
