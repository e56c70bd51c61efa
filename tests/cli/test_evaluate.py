"""`plait evaluate`: a table of scores, the same as JSON, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

from plait.cli.launch import launch
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.bpe import train_bpe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with its tokenizer, and a folder of data."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_bpe(["the cat sat on the mat. dogs bark and cats do not."] * 4, vocab_size=300)
    tokenizer.save(root / "tokenizer")
    config = ModelConfig.from_pattern("-", vocab_size=320, d_model=32, mlp={"d_ff": 64}, name="tiny")
    save(build(config), root / "model", format="native", tokenizer=root / "tokenizer")
    data = root / "data"
    data.mkdir()
    pairs = [{"sentence_good": "dogs bark.", "sentence_bad": "dogs barks."}] * 3
    (data / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"query": "Question: who barks?", "choices": ["dogs", "cats"], "gold": 0}] * 2
    (data / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "model", data


def test_scores_are_shown_and_reported(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folders[0]), "--data", str(folders[1]), "--tasks", "blimp,piqa"]
    assert launch(words) == 0
    shown = capsys.readouterr().out
    assert "evaluate tiny" in shown and "blimp" in shown and "mean" in shown and "±" in shown
    assert launch([*words, "--json", "--limit", "2"]) == 0
    facts = {f["name"]: f for f in json.loads(capsys.readouterr().out)["facts"]}
    assert set(facts) >= {"blimp accuracy", "blimp above chance", "piqa accuracy", "mean above chance", "time"}
    assert facts["blimp accuracy"]["n"] == 2 and facts["mean above chance"]["n"] == 4
    above = [facts[f"{name} above chance"]["value"] for name in ("blimp", "piqa")]
    assert facts["mean above chance"]["value"] == pytest.approx(sum(above) / 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "blump"], "task 'blump' is unknown; did you mean blimp?"),
        (["--tasks", "lambada"], "task 'lambada' needs lambada_openai.jsonl"),
        (["--limit", "-1"], "limit=-1: must be at least 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(
    words: list[str], says: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(["evaluate", str(folders[0]), "--data", str(folders[1]), *words]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


def test_a_checkpoint_without_a_tokenizer_or_with_another_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.from_pattern("-", vocab_size=200, d_model=32, mlp={"d_ff": 64})
    bare = save(build(config), tmp_path / "bare", format="native")
    assert launch(["evaluate", str(bare), "--data", str(folders[1]), "--tasks", "piqa"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    words = ["evaluate", str(bare), "--data", str(folders[1]), "--tasks", "piqa", "--tokenizer", str(folders[0])]
    assert launch(words) == 2
    assert "this is not the model's own tokenizer" in capsys.readouterr().err
