"""From a checkpoint to text and back: the engine on other people's models, and a talk that survives a restart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plait.engine.engine import Engine
from plait.engine.request import Sampling
from plait.formats.checkpoint import load, save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.bpe import train_bpe

CASES = (
    "nemotron_h_dense",
    "nemotron_h_odd",
    "nemotron_nano_v2",
    "nemotron_3_moe",
    "mamba2",
    "llama",
    "qwen2",
    "qwen3",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [3, 2048])
def test_the_engine_draws_the_ids_that_public_code_draws(shared: Path, case: str, chunk: int) -> None:
    folder = shared / "parity" / case
    engine = Engine(load(folder, device="cpu", dtype="float32"), max_batch=4, prefill_chunk=chunk)
    expected, padded = load_file(folder / "expected.safetensors"), load_file(folder / "padded.safetensors")
    prompts = expected["greedy.prompt_ids"].tolist()
    wanted = expected["greedy.ids"].tolist()
    # the padded rows without their padding: the engine pads as it likes
    mask = padded["left.attention_mask"].bool()
    prompts += [ids[real].tolist() for ids, real in zip(padded["left.input_ids"], mask, strict=True)]
    wanted += padded["left.greedy.ids"].tolist()
    settings = [Sampling(max_tokens=len(ids), temperature=0, ignore_eos=True) for ids in wanted]
    assert [c.token_ids for c in engine.generate(prompts, settings)] == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid of random weights that speaks in pieces of Python, in Hugging Face's format."""
    words = tmp_path_factory.mktemp("words")
    train_bpe([Path(json.__file__).read_text()], 512).save(words)
    config = ModelConfig.from_pattern(
        "M-M*-",
        name="parrot",
        vocab_size=512,
        d_model=32,
        init_std=0.3,
        mamba2={"n_heads": 4, "head_dim": 16, "d_state": 16, "n_groups": 2, "chunk": 16},
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        mlp={"d_ff": 64},
    )
    model = build(config, recipe="fp32")
    assert model.head is not None
    with torch.no_grad():
        # special tokens and single bytes are never drawn: every answer is text that reads back as it was drawn
        model.head.weight[:286] = 0
    path = tmp_path_factory.mktemp("models") / "parrot"
    save(model, path, format="hf", tokenizer=words)
    return path


def plait(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plait", *map(str, words)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)


def test_a_prompt_through_a_pipe_becomes_text_and_facts(folder: Path) -> None:
    done = plait("generate", folder, "--max-tokens", 9, "--temperature", 0, "--json", text="def load(")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = next(Engine(load(folder)).generate("def load(", Sampling(max_tokens=9, temperature=0)))
    assert result["completions"][0]["token_ids"] == expected.token_ids
    assert done.stdout.startswith(expected.text)
    assert result["provenance"]["command"]


def test_a_talk_goes_on_in_another_process_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", 12, "--seed", 5, "--temperature", 0.8, "--json")
    turns = ["import json", "print(it)"]
    straight = plait("chat", folder, *options, text="\n".join(turns) + "\n")
    assert straight.returncode == 0, straight.stderr
    outputs, reused = "", []
    for turn in turns:
        part = plait("chat", folder, "--session", tmp_path / "talk", *options, text=turn + "\n")
        assert part.returncode == 0, part.stderr
        *answer, report = part.stdout.splitlines(keepends=True)
        outputs += "".join(answer)
        facts = {fact["name"]: fact["value"] for fact in json.loads(report)["facts"]}
        reused.append(facts["prompt tokens reused"])
    assert outputs == "".join(straight.stdout.splitlines(keepends=True)[:-1])
    assert reused[0] == 0 < reused[1]


def test_a_model_without_a_tokenizer_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    save(load(folder), tmp_path / "mute", tokenizer=tmp_path)
    done = plait("generate", tmp_path / "mute", "hello")
    assert done.returncode == 2
    assert "no tokenizer.json" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
