"""The benchmarks themselves, on models so small that they say nothing about speed."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plait.cli.bench import Inputs, run
from plait.cli.benches import frozen, many, ops, shapes, twin
from plait.cli.benches.decode import filled
from plait.cli.benches.peers import Peers
from plait.cli.benches.sides import DisagreementError
from plait.cli.launch import launch
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.ops.norm import rms_norm
from plait.report import Report

TINY = ModelConfig.from_pattern(
    "M-*-",
    name="tiny",
    vocab_size=96,
    d_model=64,
    mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    mlp={"d_ff": 128},
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.cli.benches.limits.ARRAY_BYTES", 1 << 12)
    for name in ("read", "gemm"):
        monkeypatch.setattr(f"plait.cli.benches.limits.{name}", lambda *args, **kwargs: lambda: 1e9)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save(build(TINY, seed=0), tmp_path / "model", format="native", dtype="bfloat16"))


def facts(report: Report) -> dict[str, object]:
    names = [fact.name for fact in report.facts]
    assert len(names) == len(set(names))
    return {fact.name: fact.value for fact in report.facts}


def test_prefill_is_measured_beside_transformers(model: str) -> None:
    inputs = Inputs(what="prefill", model=model, tokens=(16, 33), rounds=2, against=("transformers",))
    found = facts(run(inputs))
    for length in (16, 33):
        ours, theirs = found[f"bf16 {length} tokens plait"], found[f"bf16 {length} tokens transformers"]
        assert isinstance(ours, float) and isinstance(theirs, float) and min(ours, theirs) > 0
        share = found[f"bf16 {length} tokens plait, share of the GEMM peak"]
        assert isinstance(share, float) and share > 0


def test_decode_is_measured_in_every_recipe_and_kept(model: str, tmp_path: Path) -> None:
    kept = tmp_path / "results" / "decode.jsonl"
    words = ["bench", "decode", "--model", model, "--depth", "0,24", "--steps", "3", "--rounds", "2"]
    assert launch([*words, "--against", "transformers", "--batch", "2", "--save", str(kept)]) == 0
    report = Report.load_jsonl(kept)
    found = facts(report)
    for recipe in ("bf16", "int8", "int4"):
        # a quotient of two times on whatever machine this is: that it is one is all that a test may ask
        ratio = found[f"{recipe} speed at depth 24 / at depth 0"]
        assert isinstance(ratio, float) and 0 < ratio < math.inf
    # 2 x (24 keys and values of 2 heads of 16 in bfloat16, a state of 64 x 16 float32, 4 inputs of 128 channels)
    states = 2 * (24 * 2 * 32 * 2 + 64 * 16 * 4 + 4 * 128 * 2)
    weights = found["int4 weights read per token"]
    assert isinstance(weights, int) and found["int4 depth 24 bytes read per step"] == weights + states
    assert weights < found["int8 weights read per token"] < found["bf16 weights read per token"]  # type: ignore[operator]
    assert "transformers" in str(found["int8 transformers"]) or "left out" in str(found["int8 transformers"])
    # the file says how it was made, and nothing of where
    head = json.loads(kept.read_text().splitlines()[0])["provenance"]
    assert str(tmp_path) not in json.dumps(head) and "commit" in head and found["threads"] == torch.get_num_threads()


def test_a_broken_fast_path_is_noticed_before_anything_is_timed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, w: Tensor, *, eps: float = 1e-5) -> Tensor:
        return x * 1.5

    monkeypatch.setattr(rms_norm, "candidates", [("wrong", lambda *args, **kwargs: True, wrong)])
    monkeypatch.setattr("plait.model.step.step", lambda *args: None)
    with pytest.raises(DisagreementError, match="fast path and reference"):
        run(Inputs(what="prefill", model=model, tokens=(16,), rounds=1))
    with pytest.raises(DisagreementError, match="rms norm"):
        for case in many.many(TINY, 20):
            ops._measure(ops.Drawn("ops"), Inputs(what="ops"), case.name, case, "cpu")


def test_a_peer_that_computes_something_else_is_noticed() -> None:
    report, other = Report("bench"), torch.ones(96)
    peers = Peers(report, Inputs(what="decode"), "tiny", "bf16", build(TINY))
    peers._compare("llama.cpp", other, other)
    assert report.facts[0].value == 0.0
    with pytest.raises(DisagreementError, match="ours and llama.cpp"):
        peers._compare("llama.cpp", other, -other)


def test_a_prompt_that_would_try_the_patience_is_left_out() -> None:
    report = Report("bench")
    peers = Peers(report, Inputs(what="prefill", patience=60.0), "tiny", "bf16", build(TINY))
    assert peers.has_patience(512, "bf16 512 tokens")
    peers.remember(512, {"plait": [0.1], "transformers": [2.5, 2.0]})
    assert peers.has_patience(2048, "bf16 2048 tokens") and not report.facts
    assert not peers.has_patience(8192, "bf16 8192 tokens")
    # 2 s x (8192 / 512)^2
    assert "512 s, after 2.0 s at 512 tokens" in str(report.facts[0].value)


def test_every_operation_is_compared_timed_and_shown() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.MODELS, "tiny", TINY)
        patch.setattr("plait.cli.benches.single.MOST_LAYERS", 2)
        patch.setattr(ops, "LEAST_S", 0.0)
        patch.setattr(ops, "DEPTH", 40)
        report = ops.measure(Inputs(what="ops", model="tiny", tokens=(20,), rounds=1))
    shown = report.table()
    for name in ("ssd, fwd + bwd", "gated norm", "attention, one token, 40 keys", "feed-forward, one token, int4"):
        assert any(line.strip().startswith(name) for line in shown.splitlines())
    floor = next(fact for fact in report.facts if fact.name == "tiny squared ReLU, floor")
    # 20 x 128 numbers of 2 bytes, read and written, at 1e9 bytes/s
    assert floor.value == pytest.approx(1e3 * 2 * 20 * 128 * 2 / 1e9)


def test_the_twin_is_measured_over_depths_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModelConfig.from_pattern(
        "*-*-",
        vocab_size=96,
        d_model=64,
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "rope": {}},
        mlp={"d_ff": 128},
    )
    monkeypatch.setitem(shapes.MODELS, "290m", TINY)
    monkeypatch.setitem(shapes.MODELS, "twin", other)
    chart = tmp_path / "docs" / "twin.svg"
    report = twin.measure(Inputs(what="twin", depth=(0, 64), steps=2, rounds=1, chart=str(chart)))
    found = facts(report)
    # two layers of keys and values of 2 heads of 16, 64 tokens, bfloat16
    assert found["depth 64 Llama cache"] == 2 * 2 * 32 * 64 * 2 and found["depth 0 Llama cache"] == 0
    assert chart.read_text().count("<circle") == 8


TERNARY = ModelConfig.from_pattern(
    "*-*-",
    name="tiny-bitnet",
    family="bitnet",
    recipe="ternary",
    vocab_size=96,
    d_model=128,
    ties_embeddings=True,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "rope": {}, "sub_norm": True},
    mlp={"d_ff": 256, "gated": True, "sub_norm": True},
)


def test_a_ternary_model_is_measured_beside_itself_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "2b4t", TERNARY)
    report = run(Inputs(what="decode", model="2b4t", depth=(16,), steps=2, rounds=1, threads=1))
    found, recipe = facts(report), "ternary-packed-int8"
    assert found[f"{recipe} depth 16 plait / plait in bf16"] > 0  # type: ignore[operator]
    # two blocks of q, o (128 x 128), k, v (64 x 128), up, gate and down: two bits a weight, four bytes of scale a row
    rows = 2 * 128 + 2 * 64 + 2 * 256 + 128
    matrices = (2 * 128 + 2 * 64 + 2 * 256) * 64 + 128 * 64
    norms = 2 * (128 + 128 + 128 + 256) + 128
    assert found[f"{recipe} weights but embedding and head"] == 2 * (matrices + 4 * rows) + 2 * norms
    assert "int8 depth 16 plait" not in found


def test_weights_are_drawn_in_their_own_numbers() -> None:
    for recipe in ("bf16", "ternary-packed", "ternary-packed-int8"):
        model = frozen.drawn(TERNARY, recipe)
        again = frozen.drawn(TERNARY, recipe).state_dict()
        assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    codes = model.state_dict()["blocks.0.mixer.q_proj.codes"]
    assert set(((codes[:, None] >> torch.tensor([0, 2, 4, 6])[:, None]) & 3).unique().tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="only attention and MLP layers are drawn"):
        frozen.drawn(TINY, "bf16")


def test_a_filled_cache_continues(model: str) -> None:
    loaded = frozen.loaded(Path(model), "bf16")
    cache = filled(loaded, 37, batch=2)
    with torch.inference_mode():
        out = loaded(torch.zeros(2, 1, dtype=torch.int64), cache=cache, n_logits=1).logits
    assert cache.n_tokens == 38 and bool(out.isfinite().all())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rounds", "0"], "rounds=0"),
        (["--against", "vllm"], "known: transformers"),
        (["--against", "llama.cpp"], "--binary LLAMA-BENCH"),
        (["--tokens", "0"], "tokens=(0,)"),
        (["--threads", "-1"], "threads=-1"),
    ],
)
def test_bad_input_is_refused_by_name(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["bench", "prefill", *words]) == 2
    assert message in capsys.readouterr().err


def test_training_is_measured_with_and_without_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr("plait.cli.benches.train._memory", lambda *args: None)
    found = facts(run(Inputs(what="train", model="tiny", recipe=("fp32",), rounds=1, against=("transformers",))))
    for part in ("forward + backward", "step"):
        assert found[f"fp32 plait {part}"] > 0 and found[f"fp32 {part}: plait / transformers"] > 0  # type: ignore[operator]
