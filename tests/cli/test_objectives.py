"""`plait train` beyond next tokens: a BF16 model becomes ternary under a teacher, and learns to answer."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.test_train import RECIPE, place  # noqa: F401  # a fixture

from plait.cli.launch import launch
from plait.cli.recipe import TrainRecipe
from plait.config import load
from plait.formats.checkpoint import load as load_model
from plait.formats.checkpoint import save
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.precision import RECIPES
from plait.text.bpe import train_bpe

FILES = Path(__file__).parents[2] / "recipes"
DATA = RECIPE[RECIPE.index("[data]") :]
CONVERT = f"""
[model]
checkpoint = "first/final"
[precision]
base = "ternary"
compute = "fp32"
gradual = {{until = 0.5}}
[distill]
teacher = "first/final"
{DATA}"""
_TALKS = RECIPE[RECIPE.index("[model]") :].replace("words", "chats").replace("seq_len = 24", "seq_len = 64")
SFT = f"""
precision = "fp32"
objective = "sft"
[sft]
tokenizer = "tokenizer"
held_out = 0.2
reduction = "sum"
{_TALKS.replace('path = "chats"', 'path = "chats.jsonl"')}
[run.optim]
clip = 0.0
"""


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def chats(place: Path) -> Path:  # noqa: F811
    """Conversations and a tokenizer beside the recipe."""
    train_bpe(["what is it? it is a test, or two"] * 3, 320).save(place / "tokenizer")
    talks = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i % 3}"}]}
        for i in range(40)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (place / "sft.toml").write_text(SFT)
    return place


def test_a_model_continues_into_ternary_under_its_own_eyes_and_is_packed(place: Path) -> None:  # noqa: F811
    assert launch(["train", "recipe.toml", "run.steps=30", "--out", "first"]) == 0
    (place / "convert.toml").write_text(CONVERT)
    assert launch(["train", "convert.toml", "run.steps=20", "--out", "second"]) == 0
    told = rows(place / "second")
    # at first it is its teacher, but for activations of eight bits
    assert told[0]["metrics"]["divergence"] < 0.01 < told[9]["metrics"]["divergence"]  # type: ignore[index]
    assert told[0]["loss"] == pytest.approx(told[0]["metrics"]["divergence"], rel=1e-5)  # type: ignore[index]
    assert load_model(place / "second" / "final", device="cpu").recipe.name == "ternary"
    packing = ["--to", "native", "--quantize", "ternary-packed", "--dtype", "float32"]
    assert launch(["convert", "second/final", "packed", *packing]) == 0
    packed = load_model(place / "packed", device="cpu", dtype="float32")
    trained = load_model(
        place / "second" / "final", device="cpu", recipe=RECIPES["ternary"].computing_in(torch.float32)
    )
    ids = torch.arange(20)[None]
    torch.testing.assert_close(packed(ids).logits, trained(ids).logits)
    # the written recipe says it all
    assert launch(["train", "second/recipe.json", "--out", "third"]) == 0
    name = "final/model.safetensors"
    assert (place / "second" / name).read_bytes() == (place / "third" / name).read_bytes()


def test_a_teacher_may_be_held_in_few_bits(place: Path) -> None:  # noqa: F811
    assert launch(["train", "recipe.toml", "run.steps=5", "--out", "first"]) == 0
    (place / "convert.toml").write_text(CONVERT)
    assert launch(["train", "convert.toml", "run.steps=2", "distill.recipe=int8-32", "--out", "few"]) == 0
    assert launch(["train", "convert.toml", "run.steps=2", "--out", "many"]) == 0
    few, many = (rows(place / name)[0]["loss"] for name in ("few", "many"))
    assert few != many and few == pytest.approx(many, abs=0.01)
    assert launch(["train", "convert.toml", "distill.recipe=int9", "--out", "none"]) == 2


def test_a_model_learns_to_answer_from_conversations(chats: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert launch(["train", "sft.toml", "run.steps=40", "--out", "run"]) == 0
    told = rows(chats / "run")
    assert told[-1]["loss"] < 0.4 * told[0]["loss"] and told[-1]["validation_loss"] < 0.4 * told[0]["loss"]
    assert (chats / "run" / "final" / "tokenizer.json").is_file()
    assert launch(["train", "run/recipe.json", "--out", "again"]) == 0
    name = "final/model.safetensors"
    assert (chats / "run" / name).read_bytes() == (chats / "again" / name).read_bytes()
    assert "cuts them all" not in caplog.text
    assert launch(["train", "sft.toml", "run.steps=1", "run.optim.clip=1.0", "--out", "clipped"]) == 0
    assert "run.optim.clip=1 cuts them all" in caplog.text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.chats.path=nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("sft.reduction=summ", 'did you mean "sum"'),
        ("sft.held_out=1.5", "held_out=1.5: must be a share"),
        ("data.sources.chats.weight=1.0", "leave out phases, max_epochs, bad_batches and the weight"),
        ("data.seq_len=4", "no conversation to train on"),
        ("objective=next-token", 'sft is given and objective="next-token"'),
        ("model.vocab_size=100", "the tokenizer in tokenizer has 303 tokens, the model's embedding 100 rows"),
        ("distill.teacher=nowhere", "nowhere does not exist"),
        ("distill.teacher=other", "distill.teacher=other has a vocabulary of 9, the model one of 303"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    chats: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    save(
        build(ModelConfig.from_pattern("-", vocab_size=9, d_model=8, mlp={"d_ff": 8}), "fp32"),
        chats / "other",
        "native",
    )
    assert launch(["train", "sft.toml", override, "--out", "run"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (chats / "run").exists()


def test_a_bad_line_is_named_by_its_number(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (chats / "chats.jsonl").open("a") as file:
        file.write('{"text": "no conversation"}\n')
    assert launch(["train", "sft.toml", "--out", "run"]) == 2
    assert "chats.jsonl line 41 has no list" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain/bitnet-hybrid", "pretrain/bitnet-transformer"])
def test_ternary_recipes_have_the_norms_and_the_schedule_of_the_paper(name: str) -> None:
    recipe = load(TrainRecipe, FILES / f"{name}.toml")
    twin = load(TrainRecipe, FILES / "lab" / f"{name.rpartition('-')[2]}-10m.toml")
    config, plain = recipe.model.config(4096), twin.model.config(4096)
    assert abs(config.cost().params / plain.cost().params - 1) < 0.002 and 9e6 < plain.cost().params < 12e6
    assert (recipe.run.steps, recipe.data) == (twin.run.steps, twin.data)
    assert recipe.precision.name == "ternary" and recipe.run.schedule.kind == "two-stage"
    names = set(build(config, "ternary").state_dict())
    for i, kind in enumerate(config.pattern):
        # Mamba-2 has its gated norm there
        where = {"M": "norm", "*": "sub_norm", "-": "sub_norm"}[kind]
        assert any(n.startswith(f"blocks.{i}.mixer.{where}") for n in names), (i, kind)


@pytest.mark.parametrize("name", ["tune/bitnet-convert", "tune/bitnet-sft"])
def test_recipes_that_go_on_from_a_checkpoint_are_whole(name: str) -> None:
    recipe = load(TrainRecipe, FILES / f"{name}.toml")
    assert recipe.model.checkpoint is not None and recipe.precision.is_needed
    assert (recipe.distill is not None) == name.endswith("convert") and (recipe.sft is not None) == name.endswith("sft")
