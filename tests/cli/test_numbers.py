"""The table of what computes in what."""

import json
import re
from pathlib import Path

import pytest

from plait.cli import info
from plait.cli.launch import launch
from plait.cli.numbers import lines, ranges
from plait.model.config import ModelConfig
from plait.precision import RECIPES
from plait.precision.format import HIGH
from plait.precision.papers import NV4, TENSORWISE


def test_every_linear_layer_of_a_published_model_is_listed_once() -> None:
    config = ModelConfig.preset("nemotron-h-8b")
    found = lines(config, RECIPES["nvfp4"])
    # 24 Mamba-2 and 24 MLP layers of two, 4 attention layers of four, and the head
    assert sum(max(1, len(line.blocks)) for line in found) == 2 * 24 + 2 * 24 + 4 * 4 + 1
    # 104 products, q, k and v being one: the last 16 of them are those of the last eight blocks
    high = {b for line in found if line.form == HIGH for b in line.blocks}
    assert high == set(range(44, 52))
    assert {line.form for line in found} == {HIGH, NV4}


def test_fp8_leaves_the_first_and_last_four_products() -> None:
    found = lines(ModelConfig.preset("nemotron-h-8b"), RECIPES["fp8"])
    assert {b for line in found if line.form == HIGH for b in line.blocks} == {0, 1, 50, 51}
    assert {line.form for line in found} == {HIGH, TENSORWISE}


def test_bytes_of_a_weight() -> None:
    config = ModelConfig.preset("nemotron-h-8b")
    each = {name: lines(config, RECIPES[name]) for name in ("fp8", "mxfp8", "nvfp4", "ternary", "int4")}

    def bytes_of(recipe: str) -> float:
        return next(
            line.bytes_per_weight(2) for line in each[recipe] if line.role == "mlp.up_proj" and 10 in line.blocks
        )

    assert [bytes_of(name) for name in each] == [1, 1 + 1 / 32, 0.5 + 1 / 256, 0.25, 0.5 + 2 / 64]
    # Mamba's dt rows stay high among ternary ones
    line = next(line for line in each["ternary"] if line.role == "mamba2.in_proj")
    assert line.high == 128 and line.bytes_per_weight(2) == pytest.approx(0.25 + 1.75 * 128 / 18560)


def test_a_recipe_is_drawn_and_told_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'base = "nvfp4"\nswitch = {at = 0.9, what = "forward"}\n[[rules]]\nrole = "mamba2.out_proj"\nformat = "mxfp8"\n'
    )
    words = ["info", "nemotron-h-8b", "--recipe", str(tmp_path / "mine.toml")]
    assert launch(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"mamba2.out_proj +4096 x 8192 .* B +1.031", shown) and "after 90% of the steps forward" in shown
    assert re.search(r"A +x W +e2m1 1x16 e4m3 +e2m1 16x16 e4m3", shown)
    assert launch([*words, "--json"]) == 0
    facts = {fact["name"]: fact["value"] for fact in json.loads(capsys.readouterr().out)["facts"]}
    assert facts["attention.o_proj 4096 x 4096 blocks 7, 18, 29, 40"] == (
        "x W: e2m1 1x16 e4m3 with e2m1 16x16 e4m3; dy W: e2m1 1x16 e4m3 stochastic with e2m1 16x16 e4m3; "
        "dy x: e2m1 1x16 e4m3 hadamard stochastic with e2m1 1x16 e4m3 hadamard"
    )
    assert facts["weights in few bits"] > 0.7


def test_plain_recipes_have_no_such_table() -> None:
    report = info.run(info.Inputs(model="nemotron-h-8b", recipe="bf16"))
    assert "linear layer" not in report.drawing


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["info", "nemotron-h-8b", "--recipe", "nvpf4"]) == 2
    assert "did you mean 'nvfp4'?" in capsys.readouterr().err


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""
