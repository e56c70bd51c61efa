"""Ternary codes that flip and are zero, against counting them one by one."""

import json
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import Stop, config
from tests.train.tiny import objective, tiny_model

from plait.data.shards import Dataset
from plait.ops.quant import quantize_ternary
from plait.train.flips import Flips
from plait.train.loop import train


def test_zeros_and_flips_are_those_of_the_codes() -> None:
    model, flips = tiny_model("M*", "ternary"), Flips()
    layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}

    def codes() -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in layers.items():
            w = layer.weight.detach()
            # z, x, B and C have scales of their own, dt stays high
            parts = w[:-4].split([32, 32, 16, 16]) if name.endswith("in_proj") else [w]
            found[name] = torch.cat([quantize_ternary(part)[0] for part in parts])
        return found

    before = codes()
    first = flips.look(model)
    assert set(first) == {f"{name}.w.zeros" for name in layers}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.add_(0.3 * layer.weight.std() * torch.randn(layer.weight.shape))
        # an odd number of codes ends in the middle of a byte
    after, second = codes(), flips.look(model)
    for name in layers:
        assert first[f"{name}.w.zeros"] == pytest.approx(float((before[name] == 0).double().mean()), rel=1e-6)
        assert second[f"{name}.w.zeros"] == pytest.approx(float((after[name] == 0).double().mean()), rel=1e-6)
        share = float((before[name] != after[name]).double().mean())
        assert 0.05 < share < 0.5 and second[f"{name}.w.flipped"] == pytest.approx(share, rel=1e-6)
    assert {v for name, v in flips.look(model).items() if name.endswith("flipped")} == {0.0}


def test_other_models_have_no_such_figures() -> None:
    assert Flips().look(tiny_model()) == {} and Flips().look(tiny_model("M*", "fp8")) == {}


def test_a_run_tells_them_from_its_second_look_and_again_after_it_was_killed(words: Dataset, tmp_path: Path) -> None:
    def run(**kwargs: object) -> None:
        model = tiny_model("M*-", "ternary")
        train(model, objective(words), config(steps=9, telemetry_every=2), tmp_path, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(on_step=Stop(5))
    run()
    rows = [json.loads(line) for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    name = "blocks.1.mixer.q_proj.w"
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(0.1 < row["figures"][f"{name}.zeros"] < 0.6 for row in rows)
    assert [f"{name}.flipped" in row["figures"] for row in rows] == [False, True, False, True]
    assert 0 < rows[1]["figures"][f"{name}.flipped"] < 0.3
