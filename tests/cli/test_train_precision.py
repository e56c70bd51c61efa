"""`plait train` in few bits: a recipe by name, file or table, and what is refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.test_train import place as place  # the fixture

from plait.cli.launch import launch
from plait.formats.checkpoint import load as load_model

WIDE = ["model.mamba2.n_heads=16", "model.mamba2.head_dim=4"]
MINE = """
base = "nvfp4"
compute = "fp32"
switch = {at = 0.5, what = "forward"}
[[rules]]
role = "mamba2.out_proj"
format = "fp8"
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, device="cpu").state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_recipe_of_ones_own_trains_and_its_run_is_repeated_from_its_folder(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "mine.toml").write_text(MINE)
    assert launch(["train", "recipe.toml", "precision=mine.toml", *WIDE, "--out", "run"]) == 0
    assert "of 33 matrix products of linear layers, 0 on tensor cores in few bits, 24 emulated" in caplog.text
    written = json.loads((place / "run" / "recipe.json").read_text())["precision"]
    assert (written["base"], written["switch"]) == ("nvfp4", {"at": 0.5, "what": "forward"})
    # the recipe of the run stands by itself, whatever becomes of the file
    (place / "mine.toml").unlink()
    assert launch(["train", "run/recipe.json", "--out", "again"]) == 0
    assert equal(weights(place / "run" / "final"), weights(place / "again" / "final"))
    # what it computed in while it was trained is not what it needs
    assert load_model(place / "run" / "final", device="cpu").config.recipe == "bf16"


def test_a_ternary_model_is_not_trained_as_if_it_were_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its masters mean nothing unrounded; what came out would be saved as ternary again."""
    assert launch(["train", "recipe.toml", "precision=ternary", *WIDE, "run.steps=1", "--out", "a"]) == 0
    text = (place / "recipe.toml").read_text()
    start = text.replace(text[text.index("[model") : text.index("[data")], '[model]\ncheckpoint = "a/final"\n')
    (place / "on.toml").write_text(start)
    capsys.readouterr()
    assert launch(["train", "on.toml", "run.steps=1", "--out", "b"]) != 0
    assert "the model is a 'ternary' one" in capsys.readouterr().err and not (place / "b").exists()
    assert launch(["train", "on.toml", "precision=ternary", "run.steps=1", "--out", "b"]) == 0
    assert launch(["train", "recipe.toml", "model.recipe=ternary", *WIDE, "--out", "c"]) != 0
    assert 'or model.recipe = "bf16"' in capsys.readouterr().err


def test_a_table_in_the_runs_own_file_is_the_same(place: Path) -> None:
    (place / "mine.toml").write_text(MINE)
    text = (place / "recipe.toml").read_text().replace('precision = "fp32"\n', "")
    table = MINE.replace("[[rules]]", "[[precision.rules]]").replace("\nbase", '\n[precision]\nname = "mine"\nbase')
    (place / "inside.toml").write_text(text + table)
    assert launch(["train", "recipe.toml", "precision=mine.toml", *WIDE, "--out", "a"]) == 0
    assert launch(["train", "inside.toml", *WIDE, "--out", "b"]) == 0
    assert equal(weights(place / "a" / "final"), weights(place / "b" / "final"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precision=nvpf4"], "recipe='nvpf4' is unknown; did you mean 'nvfp4'?"),
        (["precision=none.toml"], "recipe='none.toml': there is no such file"),
        (["precision=nvfp4"], "blocks.0.mixer.in_proj is 100 x 32, which blocks of 16x16 do not divide"),
        (['precision={rules=[{role="mpl.*", format="fp8"}]}'], "the rule role='mpl.*' means no layer of this model"),
        (['precision={rules=[{format="fp6"}]}'], "format='fp6' is unknown; did you mean 'fp8'?"),
        (["precision=int8"], "holds weights as codes, which cannot be trained"),
        (
            ['precision={base="fp8", keeps_rules=false, tensor_cores=true, rules=[{format="fp8"}]}'],
            "has no tensor cores",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert launch(["train", "recipe.toml", *words, "--out", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()
