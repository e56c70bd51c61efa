"""`plait serve`: what it refuses, how replicas are started, and a life from loading to the end of draining."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from plait.cli.launch import launch
from plait.cli.serve import Inputs, facts, replica_command
from plait.engine.engine import Engine
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.bpe import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid with its tokenizer."""
    words = tmp_path_factory.mktemp("words")
    train_bpe(["the quick brown fox jumps over the lazy dog. " * 4], 340).save(words)
    config = ModelConfig.from_pattern(
        "M*-",
        vocab_size=340,
        d_model=32,
        mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        mlp={"d_ff": 64},
    )
    path = tmp_path_factory.mktemp("models") / "model"
    save(build(config, recipe="fp32"), path, tokenizer=words)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "70000"],
        ["--max-batch", "0"],
        ["--max-waiting", "-1"],
        ["--timeout", "0"],
        ["--max-body", "10"],
        ["--cache", "much"],
        ["--host", "no such host"],
        ["--api-key", ""],
        ["--api-key", "with space"],
        ["--replicas", "0"],
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_settings_are_refused_before_anything_is_loaded(folder: Path, words: list[str], capsys) -> None:
    if words == ["--api-key", ""]:
        words = ["--api-key-file", str(folder / "plait.json.missing")]
    assert launch(["serve", str(folder), *words]) == 2
    said = capsys.readouterr().err
    assert words[0] in said or "API key" in said or "plait.json" in said
    assert "ready" not in said


def test_a_missing_checkpoint_and_a_cache_too_small_are_told(folder: Path, capsys) -> None:
    assert launch(["serve", str(folder / "none")]) == 2
    assert launch(["serve", str(folder), "--port", "0", "--cache", "1KiB"]) in (1, 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert launch(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


def test_a_replica_gets_the_words_that_concern_it(folder: Path) -> None:
    inputs = Inputs(
        checkpoint=folder,
        port=1,
        api_key="k",
        name="m",
        context=99,
        device=("cuda:0", "cuda:1"),
        replicas=2,
        recipe="int8",
    )
    words = replica_command(inputs)(1, Path("s.sock"))
    assert words[1:5] == ["-m", "plait", "serve", str(folder)]
    told = dict(zip(words[5::2], words[6::2], strict=True))
    assert told == {
        "--name": "m",
        "--context": "99",
        "--recipe": "int8",
        "--device": "cuda:0,cuda:1",
        "--socket": "s.sock",
        "--replica": "1",
    }
    assert [inputs.device_of(i) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_facts_are_those_of_the_model(folder: Path) -> None:
    found = facts(Engine(load(folder)))
    # 4 heads of 16 x 16 and, of 4 steps of the convolution, 64 channels and 2 groups of twice 16; 2 heads of 8, keys
    # and values
    assert found["pattern"] == "M*-" and found["kv_bytes_per_token"] == 2 * 2 * 8 * 4
    assert found["state_bytes"] == 4 * 16 * 16 * 4 + 4 * (64 + 2 * 2 * 16) * 4
    assert found["thinking"] is False


def test_a_life_from_loading_to_the_end_of_draining(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "plait", "serve", str(folder), "--port", str(port), "--json", "--cache", "16MiB"]
    words += ["--drain", "600"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "model"
        assert httpx.get(f"{url}/").headers["content-type"].startswith("text/html")
        answers: list[httpx.Response] = []
        ask = {"prompt": "the", "max_tokens": 1500, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=ask, timeout=600))
        )
        thread.start()
        while not (text := httpx.get(f"{url}/metrics").text) or "plait_sequences_running 1.0" not in text:
            assert thread.is_alive()
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 1500
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    report = json.loads(out.splitlines()[-1])
    assert {fact["name"]: fact["value"] for fact in report["facts"]}["answers"] == 1
    assert "ready after" in said and "draining: 1" in said
