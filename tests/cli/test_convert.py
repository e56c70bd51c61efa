"""`plait convert`: bit by bit between formats, a dtype when asked, one clear line when it cannot be."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

from plait.cli.launch import launch
from plait.formats.checkpoint import Checkpoint, load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.text.bpe import train_bpe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = ModelConfig.from_pattern(
        "M-*E",
        vocab_size=50,
        d_model=16,
        mamba2={"n_heads": 4, "head_dim": 8, "d_state": 4, "n_groups": 2},
        attention={"n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
        mlp={"d_ff": 24},
        moe={"n_experts": 4, "n_chosen": 2, "d_ff": 8, "d_shared": 12},
    )
    folder = save(build(config), tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: lazy.read() for name, lazy in Checkpoint.open(folder).tensors.items()}


def test_there_and_back_is_bitwise(source: Path, tmp_path: Path) -> None:
    assert launch(["convert", str(source), str(tmp_path / "native"), "--to", "native"]) == 0
    assert launch(["convert", str(tmp_path / "native"), str(tmp_path / "hf"), "--to", "hf", "--verify"]) == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_dtype_rounds_all_but_the_sensitive(source: Path, tmp_path: Path) -> None:
    assert launch(["convert", str(source), str(tmp_path / "x"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    before, after = _tensors(source), _tensors(tmp_path / "x")
    assert torch.equal(after["embed.weight"], before["embed.weight"].bfloat16())
    assert torch.equal(after["blocks.0.mixer.A_log"], before["blocks.0.mixer.A_log"])
    assert json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_codes_come_back_and_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantised on the way to disk or on the way into memory, it is one model, and the verbs take it."""
    config = ModelConfig.from_pattern(
        "-*-", vocab_size=300, d_model=64, mlp={"d_ff": 128}, attention={"n_heads": 2, "n_kv_heads": 1}
    )
    words = tmp_path / "words"
    train_bpe(["the quick brown fox jumps over the lazy dog. " * 4], 290).save(words)
    save(build(config, "fp32"), tmp_path / "source", "native", tokenizer=words)
    target = tmp_path / "int4"
    command = ["convert", str(tmp_path / "source"), str(target), "--to", "native", "--quantize", "int4-32", "--json"]
    assert launch(command) == 0
    facts = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out.splitlines()[-1])["facts"]}
    assert 4.5 < facts["bits per parameter"] < 8.5
    written, loaded = load(target, device="cpu"), load(tmp_path / "source", device="cpu", recipe="int4-32")
    for (name, a), b in zip(written.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    ask = ["the quick", "--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--device", "cpu"]
    answers = []
    for words in ([str(target)], [str(tmp_path / "source"), "--recipe", "int4-32"]):
        assert launch(["generate", words[0], *ask, *words[1:]]) == 0
        answers.append(capsys.readouterr().out.partition(str(tmp_path))[0])
    assert answers[0] and answers[0] == answers[1]
    assert launch(["info", str(target)]) == 0
    assert "INT4-32, " in capsys.readouterr().out


def test_help_names_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["convert", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--quantize" in said and "int8 or int4" in said and "plait convert mine mine-int4 --to native" in said


def test_no_model_is_filled(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(self: Hybrid, *_: object, **__: object) -> Hybrid:
        raise AssertionError("a model was built in memory")

    monkeypatch.setattr(Hybrid, "to_empty", filled)
    monkeypatch.setattr(Checkpoint, "model", filled)
    assert launch(["convert", str(source), str(tmp_path / "x"), "--to", "native"]) == 0


def test_the_report_counts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["convert", str(source), str(tmp_path / "x"), "--to", "native", "--json"]) == 0
    facts = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out.splitlines()[-1])["facts"]}
    assert facts["tensors"] == len(Checkpoint.open(source).tensors)
    assert facts["bytes"] == (tmp_path / "x" / "model.safetensors").stat().st_size
    assert facts["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "x", "--to", "hf"], "does not exist"),
        (["source", "source", "--to", "native"], "exists and is not empty"),
        (["source", "x", "--to", "gguf9"], "invalid choice"),
        (["source", "x"], "--to"),
        (["source", "x", "--to", "hf", "--verify"], "record no checksums"),
        (["source", "x", "--to", "native", "--quantize", "int44"], "quantize='int44' is unknown; did you mean 'int4'"),
        (["source", "x", "--to", "native", "--quantize", "bf16"], "(known: int8, int8-32,"),
        (["source", "x", "--to", "hf", "--quantize", "int4"], "no reader of Hugging Face folders knows these codes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str],
    said: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    assert launch(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_force_replaces_a_checkpoint(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert launch(["convert", str(source), str(tmp_path / "x"), "--to", "native", "--force"]) == 0


def test_damage_is_noticed_unless_told_not_to_look(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = tmp_path / "native"
    assert launch(["convert", str(source), str(native), "--to", "native"]) == 0
    raw = bytearray((native / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (native / "model.safetensors").write_bytes(raw)
    words = ["convert", str(native), str(tmp_path / "x"), "--to", "hf"]
    assert launch(words) == 2
    assert f"{native}/model.safetensors was changed or damaged" in capsys.readouterr().err
    assert launch([*words, "--no-verify"]) == 0


def test_a_full_disk_names_the_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a limit on the size of files stands for a full disk: the write fails, the opening does not
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        status = launch(["convert", str(source), str(tmp_path / "x"), "--to", "native"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert f"{tmp_path}/x/model.safetensors would be larger" in capsys.readouterr().err
