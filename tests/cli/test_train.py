"""`plait train`: a run from a recipe, and bad input that leaves nothing behind."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.train.holder import held_elsewhere
from tests.train.tiny import write_documents

from plait.cli.launch import launch
from plait.config import load
from plait.formats.checkpoint import load as load_model
from plait.report import Report

RECIPE = """
precision = "fp32"
[model]
pattern = "M-*-"
d_model = 32
[model.mamba2]
n_heads = 4
head_dim = 8
d_state = 8
n_groups = 2
chunk = 8
[model.attention]
n_heads = 4
n_kv_heads = 2
head_dim = 8
[model.mlp]
d_ff = 64
[data]
seq_len = 24
batch_size = 4
[data.sources.words]
path = "words"
[run]
steps = 6
save_every = 3
[run.schedule]
peak = 1e-2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a dataset with held-out documents."""
    (tmp_path / "words").mkdir()
    write_documents(tmp_path / "words" / "train", n=60)
    write_documents(tmp_path / "words" / "valid", n=10, seed=1)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_writes_its_model_its_metrics_and_its_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "recipe.toml", "--out", "run", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out.splitlines()[-1])
    facts = {fact["name"]: fact["value"] for fact in report["facts"]}
    assert facts["steps"] == 6 and facts["tokens"] == 6 * 96 and 3 < facts["validation loss"] < 5
    assert "step 6/6" in said.err
    assert {fact.name for fact in Report.load_jsonl(place / "run" / "report.jsonl").facts} == set(facts)
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    model = load_model(place / "run" / "final", device="cpu")
    # the vocabulary came from the data
    assert (model.config.pattern, model.config.vocab_size) == ("M-*-", 64)


def test_the_written_recipe_runs_again_with_the_same_result(place: Path) -> None:
    assert launch(["train", "recipe.toml", "run.optim.weight_decay=0.2", "--out", "one"]) == 0
    assert launch(["train", "one/recipe.json", "--out", "two"]) == 0
    name = "final/model.safetensors"
    assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
    assert (place / "one" / "recipe.json").read_text() == (place / "two" / "recipe.json").read_text()


def test_a_run_that_diverges_ends_with_3_and_shows_what_went_on_inside(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["run.steps=80", "run.schedule.peak=3.0", "run.spikes.diverged_above=0.5", "run.spikes.diverged_for=2"]
    assert launch(["train", "recipe.toml", *wild, "run.telemetry_every=10", "--out", "run"]) == 3
    assert "diverged: the loss has been more than 0.5 above its best" in capsys.readouterr().err
    assert "Largest attention logit" in (place / "run" / "telemetry.html").read_text()
    assert not (place / "run" / "final").exists()


def test_the_guard_and_telemetry_may_change_when_a_run_goes_on(place: Path) -> None:
    assert launch(["train", "recipe.toml", "--out", "run", "run.telemetry_every=2"]) == 0
    assert "telemetry" in {fact.name for fact in Report.load_jsonl(place / "run" / "report.jsonl").facts}
    changed = ["run.spikes.action=off", "run.telemetry_every=0", "run.steps=6"]
    assert launch(["train", "recipe.toml", *changed, "--out", "run"]) == 0


def test_without_a_folder_the_run_goes_by_the_recipes_name(place: Path) -> None:
    assert launch(["train", "recipe.toml", "run.steps=1", "run.save_every=0"]) == 0
    assert (place / "runs" / "recipe" / "final" / "plait.json").is_file()


def test_tokens_may_say_how_long(place: Path) -> None:
    text = RECIPE.replace("steps = 6\n", "").replace("precision", "tokens = 500\nprecision", 1)
    (place / "recipe.toml").write_text(text)
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    # 500 tokens are 5.2 steps of 96
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_training_goes_on_from_a_checkpoint(place: Path) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    text = "[model]\ncheckpoint = 'run/final'\n" + RECIPE[RECIPE.index("[data]") :]
    (place / "next.toml").write_text(text)
    assert launch(["train", "next.toml", "precision=fp32", "--out", "next"]) == 0
    first, last = (
        [json.loads(line)["loss"] for line in (place / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "next")
    )
    assert last[0] < first[0]


def test_sigterm_saves_and_ends_with_130(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.train.progress import Lines

    monkeypatch.setattr(Lines, "step", lambda self, facts: facts.step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    assert launch(["train", "recipe.toml", "--out", "run"]) == 130
    assert [path.name for path in (place / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (place / "run" / "final").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    assert launch(["train", "recipe.toml", "--out", "whole"]) == 0
    name = "final/model.safetensors"
    assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.schedule.peak=-1"], ["peak=-1", "above 0"]),
        (["run.schedule.peek=1"], ["run.schedule.peek", "peak"]),
        (["run.steps=0"], ["steps=0", "at least 1"]),
        (["run.optim.kind=adam"], ["run.optim.kind", "adamw"]),
        (["tokens=1000"], ["tokens=1000", "run.steps=6"]),
        (["model.vocab_size=50"], ["64 tokens", "50 rows", "model.vocab_size"]),
        (["model.pattern=M-X"], ["'X'", "position 2"]),
        (["model.d_modl=3"], ["d_modl", "d_model"]),
        (["model.checkpoint=nowhere"], ["checkpoint", "leave out"]),
        (["data.sources.words.path=elsewhere"], ["elsewhere"]),
        (["data.accumulate=3"], ["accumulate=3", "batch_size=4"]),
        (["data.sources.words.weight=-1"], ["-1"]),
        (["data.max_epochs.words=0.01"], ["words", "max_epochs"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["precision=fp7"], ["fp7"]),
        (["precision=int4"], ["cannot be trained", "--quantize"]),
        (["device=quantum"], ["quantum"]),
        (["run.schedule.warmup_steps=9"], ["warmup_steps=9", "6 steps"]),
        (["--resume", "perhaps"], ["perhaps"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert launch(["train", "recipe.toml", *words, "--out", "run"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for word in said:
        assert word in message, message
    assert sorted(place.rglob("*")) == before


def test_an_empty_corpus_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(place / "nothing", n=0)
    assert launch(["train", "recipe.toml", "data.sources.words.path=nothing", "--out", "run"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_truncated_shard_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = place / "words" / "train" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    assert launch(["train", "recipe.toml", "--out", "run"]) == 2
    assert "tokens-00000.bin" in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_folder_with_another_run_is_left_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    for words, said in (
        (["seed=1"], "seed was 0 and is 1"),
        (["model.mlp.d_ff=32"], "model.mlp.d_ff was 64 and is 32"),
        (["run.schedule.peak=2e-2"], "learning rate of step 1"),
        (["--resume", "never"], "never"),
    ):
        capsys.readouterr()
        assert launch(["train", "recipe.toml", *words, "--out", "run"]) == 2
        assert said in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}


def test_other_data_under_the_same_name_is_noticed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    (place / "words").rename(place / "before")
    (place / "words").mkdir()
    write_documents(place / "words" / "train", n=60, seed=3)
    assert launch(["train", "recipe.toml", "--out", "run"]) == 2
    assert "data.sources.words" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    assert launch(["train", "recipe.toml", "--out", "file/run"]) == 2
    assert "is a file" in capsys.readouterr().err
    # a place that refuses new folders, to root too, whatever its rights say
    if Path("/proc/self").exists():
        monkeypatch.setattr("plait.cli.train._model", None)
        assert launch(["train", "recipe.toml", "--out", "/proc/foo/x"]) == 2
        said = capsys.readouterr().err.strip()
        assert "out=/proc/foo/x cannot be written" in said and "\n" not in said


def test_two_processes_do_not_train_in_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_elsewhere(place / "run"):
        assert launch(["train", "recipe.toml", "--out", "run"]) == 2
        assert "another process trains in run" in capsys.readouterr().err
        assert [path.name for path in (place / "run").iterdir()] == [".lock"]
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0


def test_a_run_that_failed_before_it_saved_anything_holds_no_place(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("plait.train.loop.update", fail)
    assert launch(["train", "recipe.toml", "--out", "run"]) == 1
    assert (place / "run" / "recipe.json").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert launch(["train", "recipe.toml", "model.mlp.d_ff=32", "--out", "run"]) == 0
    assert json.loads((place / "run" / "recipe.json").read_text())["model"]["mlp"]["d_ff"] == 32
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_result_without_its_checkpoints_still_belongs_to_its_recipe(place: Path) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    shutil.rmtree(place / "run" / "checkpoints")
    assert launch(["train", "recipe.toml", "model.mlp.d_ff=32", "--out", "run"]) == 2


def test_what_a_kill_left_of_the_result_is_swept_or_put_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    run = place / "run"
    (run / "final").rename(run / ".final.aa.old")
    (run / ".final.bb.new").mkdir()
    (run / ".final.bb.new" / "model.safetensors").write_bytes(b"half")
    # another recipe is refused all the same, and the old result stays
    assert launch(["train", "recipe.toml", "seed=1", "--out", "run"]) == 2
    assert load_model(run / "final", device="cpu").config.vocab_size == 64
    assert not list(run.glob(".final.*"))


def test_a_damaged_checkpoint_is_no_place_to_start(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["train", "recipe.toml", "--out", "run"]) == 0
    weights = place / "run" / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (place / "next.toml").write_text("[model]\ncheckpoint = 'run/final'\n" + RECIPE[RECIPE.index("[data]") :])
    assert launch(["train", "next.toml", "precision=fp32", "--out", "next"]) == 2
    assert "model.safetensors was changed or damaged" in capsys.readouterr().err
    assert not (place / "next").exists()


@pytest.mark.parametrize("name", ["tiny-hybrid", "hybrid-45m"])
def test_recipes_that_come_with_plait_are_whole(name: str) -> None:
    from plait.cli.recipe import TrainRecipe

    path = Path(__file__).parents[2] / "recipes" / "pretrain" / f"{name}.toml"
    recipe = load(TrainRecipe, path)
    params = recipe.model.config(4096).cost().params
    assert {"tiny-hybrid": 2e6 < params < 5e6, "hybrid-45m": 44e6 < params < 46e6}[name]
