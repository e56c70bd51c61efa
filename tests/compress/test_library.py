"""The library of measured blocks: what it keeps, what it measures, what it interpolates; never how long things take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.compress import library as library_file
from plait.compress.blocks import about_layer, about_rest, footprint_class, read_bytes, step_bytes
from plait.compress.budget import Budget
from plait.compress.costs import Costs, Load
from plait.compress.library import BlockLibrary, knots
from plait.compress.numbers import Numbers, layer_weights
from plait.compress.stopwatch import Run, filled, in_turns, prompts, ready, seconds_of, typical
from plait.config import ConfigError
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE

CONFIG = ModelConfig.from_pattern(
    "M-*-",
    vocab_size=128,
    d_model=32,
    mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    mlp={"d_ff": 64},
)
LOAD = Load(batch=2, context=40, answer=8)


def linear(runs, **how):  # type: ignore[no-untyped-def]
    """A machine that takes so long by formula: no model is run."""
    layers = {run: run.config.layers for run in runs}
    read = {run: 100.0 + sum(spec.d_ff + run.config.d_model for spec in layers[run]) for run in layers}
    step = {run: 10.0 + sum(2.0 * spec.d_ff for spec in layers[run]) for run in layers}
    return {run: read[run] if run.tokens else step[run] for run in layers}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[BlockLibrary]:
    """Libraries of that machine."""
    monkeypatch.setattr(library_file, "seconds_of", linear)
    return BlockLibrary


def test_each_shape_is_measured_once_and_kept(tmp_path: Path) -> None:
    path, told = tmp_path / "deep" / "blocks.jsonl", []
    costs = Costs(load=LOAD, clock=BlockLibrary(path=path, rounds=1, footprint=2**20, on_measure=told.append))
    first = costs.total(CONFIG)
    assert first.prefill_s > 0 and first.decode_s > 0
    # three kinds, one of them twice, and the rest
    assert len(told) == 4 and len(path.read_text().splitlines()) == 4
    assert costs.total(CONFIG) == first and len(told) == 4
    # another process finds all of it
    again = BlockLibrary(path=path, rounds=1, footprint=2**20, on_measure=told.append)
    assert Costs(load=LOAD, clock=again).total(CONFIG) == first and len(told) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"load": Load(batch=1, context=40, answer=8)},
        {"load": Load(batch=2, context=41, answer=6)},
        {"load": Load(batch=2, context=40, answer=20)},
        {"footprint": 2**24},
    ],
    ids=["batch", "context", "answer", "footprint"],
)
def test_a_time_is_kept_for_what_it_depends_on_only(counted: type[BlockLibrary], change: dict, tmp_path: Path) -> None:
    told: list[str] = []
    clock = counted(path=tmp_path / "blocks.jsonl", on_measure=told.append)
    for weights in ("bf16", "fp32"):
        clock.layer(MLP(d_ff=8), 32, LOAD, Numbers(weights=weights))
    clock.layer(MLP(d_ff=8), 64, LOAD, Numbers())
    clock.layer(MLP(d_ff=8, gated=True), 32, LOAD, Numbers())
    assert len(told) == 4
    other = replace(clock, footprint=change.get("footprint", clock.footprint))
    other.layer(MLP(d_ff=8), 32, change.get("load", LOAD), Numbers())
    assert len(told) == 5
    # formats of the cache change bytes, not what is run here
    other.layer(MLP(d_ff=8), 32, change.get("load", LOAD), Numbers(kv="fp8"))
    assert len(told) == 5


def test_times_add_up_by_layer(counted: type[BlockLibrary], tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=8, d_model=4, layers=(MLP(d_ff=8), MLP(d_ff=16), MLP(d_ff=8)))
    total = Costs(load=LOAD, clock=counted(path=tmp_path / "blocks.jsonl")).total(config)
    assert (total.prefill_s, total.decode_s) == (100 + 32 + 12, 10 + 64)


def test_between_two_widths_a_time_is_interpolated_where_asked(counted: type[BlockLibrary], tmp_path: Path) -> None:
    told: list[str] = []
    clock = counted(path=tmp_path / "blocks.jsonl", interpolates=True, on_measure=told.append)
    # 1,280 and 1,344 lie between 1,024 and 1,536; the formula of the double is a straight line
    assert clock.layer(MLP(d_ff=1280), 32, LOAD, Numbers()) == pytest.approx((1312.0, 2560.0))
    assert clock.layer(MLP(d_ff=1344), 32, LOAD, Numbers()) == pytest.approx((1376.0, 2688.0))
    assert [json.loads(words)["d_ff"] for words in told] == [1024, 1536]
    clock.layer(MLP(d_ff=1024), 32, LOAD, Numbers())
    assert len(told) == 2
    counted(path=clock.path, on_measure=told.append).layer(MLP(d_ff=1280), 32, LOAD, Numbers())
    assert len(told) == 3


def test_answers_do_not_depend_on_the_order_of_the_questions(counted: type[BlockLibrary], tmp_path: Path) -> None:
    widths = [64 * n for n in range(1, 40)]

    def answers(path: Path, order: list[int]) -> dict[int, tuple[float, float]]:
        clock = counted(path=path, interpolates=True)
        return {n: clock.layer(MLP(d_ff=n), 32, LOAD, Numbers()) for n in order}

    assert answers(tmp_path / "a", widths) == answers(tmp_path / "b", widths[::-1]) == answers(tmp_path / "a", widths)
    assert len((tmp_path / "a").read_text().splitlines()) == 11


@pytest.mark.parametrize(
    ("spec", "low", "high", "share"),
    [
        (MLP(d_ff=1280), MLP(d_ff=1024), MLP(d_ff=1536), 0.5),
        (MLP(d_ff=64), MLP(d_ff=64), MLP(d_ff=64), 0.0),
        (MLP(d_ff=100), MLP(d_ff=96), MLP(d_ff=128), 0.125),
        (MLP(d_ff=7), MLP(d_ff=6), MLP(d_ff=8), 0.5),
        (Mamba2(n_heads=40, n_groups=8), Mamba2(n_heads=32, n_groups=8), Mamba2(n_heads=48, n_groups=8), 0.5),
        (Mamba2(n_heads=24, n_groups=8), Mamba2(n_heads=24, n_groups=8), Mamba2(n_heads=24, n_groups=8), 0.0),
        (
            MoE(n_experts=8, n_chosen=2, d_ff=320),
            MoE(n_experts=8, n_chosen=2, d_ff=256),
            MoE(n_experts=8, n_chosen=2, d_ff=384),
            0.5,
        ),
        (Attention(n_heads=5, n_kv_heads=5), Attention(n_heads=5, n_kv_heads=5), Attention(n_heads=5, n_kv_heads=5), 0),
    ],
)
def test_knots_lie_around_a_width_and_make_layers(
    spec: LayerSpec, low: LayerSpec, high: LayerSpec, share: float
) -> None:
    assert knots(spec) == (low, high, pytest.approx(share))


def test_what_another_process_measured_meanwhile_is_not_lost(counted: type[BlockLibrary], tmp_path: Path) -> None:
    path = tmp_path / "blocks.jsonl"
    one, two = counted(path=path), counted(path=path)
    one.layer(MLP(d_ff=8), 32, LOAD, Numbers())
    two.layer(MLP(d_ff=16), 32, LOAD, Numbers())
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["blocks.jsonl"]


@pytest.mark.parametrize("line", ["{", '{"key": {}}', '{"key": {}, "prefill_s": "a", "decode_s": 1}', "3"])
def test_a_broken_line_is_named(counted: type[BlockLibrary], line: str, tmp_path: Path) -> None:
    path = tmp_path / "blocks.jsonl"
    counted(path=path).layer(MLP(d_ff=8), 32, LOAD, Numbers())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"blocks.jsonl, line 2 is no measured block"):
        BlockLibrary(path=path)


@pytest.mark.parametrize("footprint", [2**20, 2**22, 2**24])
def test_a_whole_is_recovered_from_parts_on_a_machine_whose_caches_are_small(
    footprint: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(config: ModelConfig, load: Load) -> float:
        # each layer a time of its own; every byte costs the more, the more bytes a step reads
        n_bytes = read_bytes(config, load, "bf16")
        return 3e-5 + 1e-5 * len(config.layers) + n_bytes * 1e-11 * (1 + n_bytes / 2**22) ** 2

    monkeypatch.setattr(
        library_file, "seconds_of", lambda runs, **how: {run: seconds(run.config, run.load) for run in runs}
    )
    load, wide = Load(context=64), MLP(d_ff=256)
    scan = Mamba2(n_heads=16, head_dim=16, d_state=16, n_groups=2)
    specs = (wide, scan, Attention(n_heads=4, n_kv_heads=2, head_dim=32)) * (footprint // 2**20)
    layers = read_bytes(ModelConfig(vocab_size=1, d_model=128, layers=specs), load, "bf16")
    # the head makes it read just the footprint
    rows = round((footprint - layers) / 256)
    config = ModelConfig(vocab_size=rows, d_model=128, layers=specs)
    assert read_bytes(config, load, "bf16") == pytest.approx(footprint, rel=0.001) and rows > 1000
    clock = BlockLibrary(path=tmp_path / "blocks.jsonl", footprint=footprint)
    told = Costs(load=load, clock=clock).total(config).decode_s
    # whole numbers of layers come as near to the footprint as half of one
    assert told == pytest.approx(seconds(config, load), rel=0.06)


def test_what_is_asked_together_is_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    monkeypatch.setattr(library_file, "seconds_of", lambda runs, **how: groups.append(len(set(runs))) or linear(runs))
    load, numbers = Load(context=40), Numbers()
    clock = BlockLibrary(path=tmp_path / "blocks.jsonl", footprint=2**20)

    def ask() -> list[tuple[float, float]]:
        return [clock.layer(MLP(d_ff=n), 32, load, numbers) for n in (64, 128, 64)]

    whole = Run(config=replace(CONFIG, layers=(MLP(d_ff=8),)), weights="bf16", load=load)
    assert clock.together(ask, beside=[whole]) == ([(96.0, 128.0), (160.0, 256.0), (96.0, 128.0)], {whole: 26.0})
    # steps and prompts of the host, which both have, and of two models for each layer
    assert groups == [2 + 2 * 2 + 1]
    assert clock.together(ask) == (ask(), {}) and len(groups) == 1
    # what takes more memory than there is room for is measured one after the other
    monkeypatch.setattr(library_file, "ROOM", 0.0)
    clock.together(lambda: [clock.layer(MLP(d_ff=n), 32, load, numbers) for n in (256, 512)])
    assert groups[1:] == [4, 4]


def test_a_question_that_fails_leaves_a_library_that_measures(counted: type[BlockLibrary], tmp_path: Path) -> None:
    clock = counted(path=tmp_path / "blocks.jsonl")
    with pytest.raises(ZeroDivisionError):
        clock.together(lambda: clock.layer(MLP(d_ff=8), 32, LOAD, Numbers())[0] / 0)
    assert clock.layer(MLP(d_ff=8), 32, LOAD, Numbers()) == (40.0, 16.0)


def test_a_speedup_over_a_teacher_that_nothing_is_known_of_is_measured(
    counted: type[BlockLibrary], tmp_path: Path
) -> None:
    clock = counted(path=tmp_path / "blocks.jsonl")
    teacher = ModelConfig.from_pattern("--", vocab_size=128, d_model=32, mlp={"d_ff": 64})
    costs, budget = Costs(load=LOAD, clock=clock), Budget(min_speedup=1.25)
    found, _ = clock.together(lambda: budget.against(costs.total(teacher)))
    assert found.decode_s == pytest.approx(costs.total(teacher).decode_s / 1.25) and found.decode_s > 1


def test_layers_are_repeated_until_they_read_as_much_as_a_model() -> None:
    how = {"load": Load(context=64), "weights": "bf16", "footprint": 2**20, "piece": 2048}
    # 2 x 2 x 64 x 256 bytes and a norm: sixteen of them are 1 MiB
    built = {len(run.config.layers) for run in about_layer(MLP(d_ff=256), 64, **how).runs}
    assert built == {1, 1 + 3, 1 + 16}
    # 2 x 2 x 64 x 64 bytes of products of queries and outputs, 2 x 2 x 64 x 64 of keys and values, held and computed
    attention = about_layer(Attention(n_heads=4, n_kv_heads=4, head_dim=16), 64, **how)
    assert max(len(run.config.layers) for run in attention.runs) == 1 + round(2**20 / (4 * 8192 + 128 + 2 * 8192))


def test_the_head_is_measured_among_layers_that_fill_the_caches() -> None:
    config = replace(CONFIG, vocab_size=4096)
    runs = about_rest(config, LOAD, "bf16", footprint=2**20, piece=2048).runs
    built = {(run.config.vocab_size, len(run.config.layers)) for run in runs}
    # a head of 2 x 32 x 4096 bytes leaves room for 48 layers of 2 x 2 x 32 x 128; 64 of them fill the footprint
    assert built == {(64, 1), (64, 65), (4096, 49)}
    # a head that fills it alone needs no others beside it
    runs = about_rest(replace(CONFIG, vocab_size=2**16), LOAD, "bf16", footprint=2**20, piece=2048).runs
    assert {(run.config.vocab_size, len(run.config.layers)) for run in runs} == {(64, 1), (64, 65), (2**16, 1)}


def test_means_are_kept_and_disturbed_measurements_are_not() -> None:
    assert typical([1.0]) == 1.0 and typical([1.0, 4.0]) == 2.5
    assert typical([9.0, 2.0, 3.0, 4.0, 900.0]) == pytest.approx(16 / 3)


def test_bytes_of_a_step_are_those_of_weights_keys_and_states() -> None:
    spec, load = Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=2), Load(batch=3, context=40, answer=8)
    cost = KINDS["M"].cost(spec, 32)
    states = 4 * 4 * 16 * 16 + 2 * cost.conv_numbers
    assert step_bytes(spec, 32, load, "bf16") == layer_weights(spec, 32, "bf16").read + 3 * states
    attention = Attention(n_heads=4, n_kv_heads=2, head_dim=8)
    kv = 2 * 2 * 8 * 2 * 44 * 3
    assert step_bytes(attention, 32, load, "bf16") == layer_weights(attention, 32, "bf16").read + kv


def test_footprints_are_half_powers_of_two_between_a_mebibyte_and_what_no_cache_holds() -> None:
    sizes = {0: 2**20, 3 * 2**20: round(2**21.5), 2**23: 2**23, 1.15 * 2**24: 2**24, 1.3 * 2**24: round(2**24.5)}
    sizes |= {2**34: 2**26}
    assert {n: footprint_class(n) for n in sizes} == sizes


def test_numbers_in_which_nothing_runs_here_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights='4.5 bit': no time can be measured in these numbers"):
        ready(CONFIG, "4.5 bit")


@pytest.mark.parametrize("weights", ["bf16", "fp32", "int8-32"])
def test_a_model_is_measured_in_the_numbers_in_which_it_would_be_loaded(weights: str) -> None:
    model = ready(CONFIG, weights)
    held = {name: t.dtype for name, t in model.state_dict().items()}
    assert held["blocks.0.mixer.A_log"] == torch.float32
    assert held["embed.weight"] == (torch.float32 if weights == "fp32" else torch.bfloat16)
    assert ("blocks.1.mixer.down_proj.codes" in held) == (weights == "int8-32")
    step = Run(config=CONFIG, weights=weights, load=LOAD)
    found = seconds_of([step, replace(step, is_whole=True)], rounds=1)
    assert len(found) == 2 and all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize("piece", [7, 40, 2048])
def test_prompts_are_read_in_pieces_as_the_engine_reads_them(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = ready(CONFIG, "fp32"), []
    forward = model.forward

    def heard(ids, **how):  # type: ignore[no-untyped-def]
        calls.append((ids.shape, how["cache"].n_tokens, how["n_logits"]))
        return forward(ids, **how)

    monkeypatch.setattr(model, "forward", heard)
    prompts(model, LOAD, piece=piece)()
    width = max(1, piece // 2)
    assert [depth for _, depth, _ in calls] == list(range(0, 40, width))
    assert sum(shape[1] for shape, *_ in calls) == 40 and all(shape[0] == 2 for shape, *_ in calls)
    assert [n for *_, n in calls] == [0] * (len(calls) - 1) + [1]


def test_sides_are_run_in_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    sides = [lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0]
    assert in_turns(sides, 3) == [[1.0] * 3, [2.0] * 3] and "".join(order) == "abababab"


def test_a_filled_cache_holds_as_many_tokens_as_asked() -> None:
    model = ready(CONFIG, "fp32")
    cache = filled(model, 17, batch=3)
    assert cache.n_tokens == 17 and cache.lengths.tolist() == [17] * 3
    assert cache.tensors()["layers.2.k"].shape == (3, 2, 17, 8)
    assert json.dumps(cache.batch) == "3"
