"""`plait generate`: prompts from every place, the same text as the engine, facts, and errors with their fix."""

import io
import json
from pathlib import Path

import pytest

from plait.cli.launch import launch
from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.bpe import train_bpe

GREEDY = ["--max-tokens", "8", "--temperature", "0", "--ignore-eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid with its tokenizer."""
    words = tmp_path_factory.mktemp("words")
    train_bpe(["the quick brown fox jumps over the lazy dog. süßer Bär 🐻 " * 4], 340).save(words)
    config = ModelConfig.from_pattern(
        "M-M*-",
        vocab_size=340,
        d_model=32,
        init_std=0.3,
        mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        mlp={"d_ff": 64},
    )
    path = tmp_path_factory.mktemp("models") / "model"
    save(build(config, recipe="fp32"), path, tokenizer=words)
    return path


def generate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = launch(["generate", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def expected(folder: Path, prompt: str | list[int]) -> str:
    engine = Engine(load(folder, device="cpu"))
    return next(engine.generate([prompt], Sampling(max_tokens=8, temperature=0, ignore_eos=True))).text


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_prompt_is_continued_and_measured(folder: Path, capsys: pytest.CaptureFixture[str], stream: str) -> None:
    status, out, _ = generate(capsys, folder, "the fox", *GREEDY, stream)
    assert status == 0
    assert out.startswith(expected(folder, "the fox"))
    for fact in ("prompt tokens", "generated tokens", "prefill speed", "decode speed", "cache"):
        assert fact in out


def test_json_ends_with_facts_and_completions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = generate(capsys, folder, "the fox", *GREEDY, "--json")
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert result["completions"][0]["text"] == expected(folder, "the fox")
    facts = {fact["name"]: fact["value"] for fact in result["facts"]}
    assert facts["generated tokens"] == 8 and facts["finish reason"] == "length"
    assert facts["largest cache of a sequence"] > 0


def test_a_prompt_may_come_from_a_file_or_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    _, from_file, _ = generate(capsys, folder, "--prompt-file", tmp_path / "prompt.txt", *GREEDY)
    monkeypatch.setattr("sys.stdin", io.StringIO("the lazy dog\n"))
    _, from_pipe, _ = generate(capsys, folder, *GREEDY)
    text = expected(folder, "the lazy dog")
    assert from_file.startswith(text) and from_pipe.startswith(text)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_many_prompts_are_answered_in_order(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    prompts = ["the fox jumps over the lazy dog", "the", "quick brown"]
    lines = [json.dumps({"prompt": p}) if name.endswith("jsonl") else p for p in prompts]
    (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    _, out, _ = generate(capsys, folder, "--prompts-file", tmp_path / name, *GREEDY, "--json")
    texts = [entry["text"] for entry in json.loads(out.splitlines()[-1])["completions"]]
    assert texts == [expected(folder, p) for p in prompts]


def test_ids_need_no_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(load(folder, device="cpu"), tmp_path / "bare", tokenizer=tmp_path)
    status, out, _ = generate(capsys, tmp_path / "bare", "--ids", "1,2,3", *GREEDY)
    assert status == 0
    assert len(out.splitlines()[0].split()) == 8
    status, _, err = generate(capsys, tmp_path / "bare", "hello", *GREEDY)
    assert status == 2
    assert "has no tokenizer.json" in err and "--ids 1,2,3" in err and len(err.splitlines()) == 1


def test_chat_puts_the_prompt_into_the_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = generate(capsys, folder, "hi", *GREEDY, "--chat", "--json")
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads(out.splitlines()[-1])["completions"][0]["text"] == expected(folder, prompt)


def test_stop_texts_and_seeds_reach_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected(folder, "the fox")
    stop = whole[4:7]
    _, out, _ = generate(capsys, folder, "the fox", *GREEDY, "--stop", stop, "--json")
    assert json.loads(out.splitlines()[-1])["completions"][0]["text"] == whole.partition(stop)[0]
    runs = [generate(capsys, folder, "the fox", "--seed", 3, "--max-tokens", 6)[1].splitlines()[0] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi", "--temperature", "-1"], "temperature=-1.0"),
        (["hi", "--top-p", "2"], "top_p=2.0"),
        (["hi", "--ids", "1,2"], "prompt and --ids: give the prompt in one way only"),
        (["--chat", "--ids", "1"], "--chat and --ids"),
        (["--ids", "1,999"], "token id 999; the model's ids run from 0 to 339"),
        ([""], "is empty"),
        (["--prompt-file", "absent.txt"], "absent.txt does not exist"),
        (["hi", "--max-batch", "0"], "max_batch=0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, _, err = generate(capsys, folder, *words)
    assert status == 2
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"\n\n", "holds no prompt"),
        (b'{"prompt": "a"}\n{"text": 1}', "prompt 2 is no prompt"),
        (b"{", "prompt 1 is not JSON"),
    ],
)
def test_a_bad_file_of_prompts_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    status, _, err = generate(capsys, folder, "--prompts-file", tmp_path / "bad.jsonl")
    assert status == 2
    assert "bad.jsonl" in err and message in err


def test_no_prompt_at_all_says_what_to_give(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    status, _, err = generate(capsys, folder)
    assert status == 2 and "there is no prompt" in err
