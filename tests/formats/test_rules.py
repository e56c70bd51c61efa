"""Names both ways: what is missing, left over or misshapen is named as it is in the file."""

import logging

import pytest
import torch

from plait.formats.error import CheckpointError
from plait.formats.families.nemotron_h import NAMES
from plait.formats.rules import same_names, shapes_of, to_ours, to_theirs
from plait.formats.tensors import LazyTensor
from plait.model.hybrid import Hybrid


def _theirs(model: Hybrid) -> dict[str, LazyTensor]:
    lazy = {name: LazyTensor.of(t) for name, t in model.state_dict().items()}
    return to_theirs(NAMES, model.config, lazy)


def _check_equal(model: Hybrid, stored: dict[str, LazyTensor]) -> None:
    ours = to_ours(NAMES, model.config, stored, "here")
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name].read(), t) for name, t in model.state_dict().items())


def test_shapes_are_those_of_the_built_model(tiny: Hybrid) -> None:
    assert shapes_of(tiny.config) == {name: tuple(t.shape) for name, t in tiny.state_dict().items()}


def test_import_after_export_is_the_identity(tiny: Hybrid) -> None:
    _check_equal(tiny, _theirs(tiny))


def test_published_shapes_are_written(tiny: Hybrid) -> None:
    theirs = _theirs(tiny)
    assert theirs["backbone.layers.0.mixer.conv1d.weight"].shape == (48, 1, 4)
    assert theirs["backbone.layers.3.mixer.experts.3.up_proj.weight"].shape == (8, 16)
    assert theirs["backbone.layers.3.mixer.gate.e_score_correction_bias"].shape == (4,)
    second = tiny.state_dict()["blocks.3.mixer.experts.down"][1]
    assert torch.equal(theirs["backbone.layers.3.mixer.experts.1.down_proj.weight"].read(), second)


def test_merged_experts_and_other_prefixes_are_read(tiny: Hybrid) -> None:
    stored = {}
    for name, tensor in _theirs(tiny).items():
        if ".experts." not in name:
            name = name.replace("backbone.", "model.").replace("bias_", "").replace("norm_f", "norm")
            stored[name.replace("A_log", "_fp32_params.A_log")] = tensor
    for part in ("up", "down"):
        merged = tiny.state_dict()[f"blocks.3.mixer.experts.{part}"]
        stored[f"model.layers.3.mixer.experts.{part}_proj"] = LazyTensor.of(merged)
    _check_equal(tiny, stored)


def test_missing_tensors_are_counted_and_named_as_in_the_file(tiny: Hybrid) -> None:
    stored = _theirs(tiny)
    del stored["backbone.layers.3.mixer.experts.2.up_proj.weight"], stored["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"2 tensors are missing \(.*experts.2.up_proj.weight.*\)") as caught:
        to_ours(NAMES, tiny.config, stored, "here")
    assert "lm_head.weight" in str(caught.value)


def test_leftover_tensors_are_counted_and_named(tiny: Hybrid) -> None:
    stored = _theirs(tiny) | {"backbone.layers.9.norm.weight": LazyTensor.of(torch.ones(3))}
    with pytest.raises(
        CheckpointError, match=r"1 tensors have no place in the model \(backbone.layers.9.norm.weight\)"
    ):
        to_ours(NAMES, tiny.config, stored, "here")


def test_an_expert_too_many_is_left_over(tiny: Hybrid) -> None:
    extra = "backbone.layers.3.mixer.experts.4.up_proj.weight"
    with pytest.raises(CheckpointError, match="experts.4.up_proj"):
        to_ours(NAMES, tiny.config, _theirs(tiny) | {extra: LazyTensor.of(torch.ones(8, 16))}, "here")


def test_further_predictors_are_ignored_and_counted(tiny: Hybrid, caplog: pytest.LogCaptureFixture) -> None:
    stored = _theirs(tiny) | {f"mtp.layers.{i}.norm.weight": LazyTensor.of(torch.ones(3)) for i in range(2)}
    with caplog.at_level(logging.INFO, "plait.formats"):
        _check_equal(tiny, stored)
    assert [record.getMessage() for record in caplog.records] == [
        "2 tensors are not part of the model and stay unread (mtp.layers.0.norm.weight, ...)"
    ]


def test_a_wrong_shape_names_tensor_shapes_and_field(tiny: Hybrid) -> None:
    stored = _theirs(tiny)
    stored["backbone.layers.1.mixer.up_proj.weight"] = LazyTensor.of(torch.ones(25, 16))
    with pytest.raises(CheckpointError, match=r"up_proj.weight' has shape \(25, 16\).* \(24, 16\); look at interm"):
        to_ours(NAMES, tiny.config, stored, "here")


def test_quantised_codes_are_not_taken_for_weights(tiny: Hybrid) -> None:
    stored = _theirs(tiny)
    stored["backbone.layers.1.mixer.up_proj.weight"] = LazyTensor.of(torch.ones(24, 16).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match="float8_e4m3fn codes; quantised weights are not read yet"):
        to_ours(NAMES, tiny.config, stored, "here")


def test_our_own_names_are_checked_too(tiny: Hybrid) -> None:
    stored = {name: LazyTensor.of(t) for name, t in tiny.state_dict().items()}
    assert same_names(tiny.config, stored, "here").keys() == stored.keys()
    stored["extra"] = stored.pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"missing \(norm.weight\) and 1 tensors have no place .*\(extra\)"):
        same_names(tiny.config, stored, "here")
