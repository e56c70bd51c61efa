"""Layers left out: the errors are those of models without them, and what comes before is not computed again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.compress import teachers

from plait.compress.axes.depth import keep_layers
from plait.compress.layers import LayerScores, score_layers
from plait.compress.plan import shrunk
from plait.compress.prune import prune
from plait.compress.score import score
from plait.compress.twins import twin_layers
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid, build
from plait.train.objective import mean_loss
from plait.train.pretrain import NextToken

PATTERN = "M-*M-E"


def without(model: Hybrid, gone: set[int], folder: Path) -> Hybrid:
    """The model with layers left out, built and loaded as such."""
    plan = shrunk(model.config, tuple(i for i in range(len(model.blocks)) if i not in gone))
    scores = score(model, teachers.batches(1), axes=["depth"])
    return teachers.student(prune(teachers.checkpoint(model, folder), plan, scores))


def loss(model: Hybrid, text: list[teachers.Batch]) -> float:
    return mean_loss(model, object.__new__(NextToken), text)


@pytest.mark.parametrize("ties", [False, True])
def test_errors_are_those_of_models_without_the_layer(ties: bool, tmp_path: Path) -> None:
    model, text = teachers.teacher(PATTERN, ties_embeddings=ties), teachers.batches(2)
    found = score_layers(model, text, measures=("mse", "input", "loss"))
    whole = teachers.logits(model, text)
    for layer in (0, 2, 5):
        small = without(model, {layer}, tmp_path / str(layer))
        mse = (teachers.logits(small, text) - whole).square().mean()
        # experts add up in float32
        assert found.importance["mse"][layer] == pytest.approx(float(mse), rel=1e-4)
        rise = loss(small, text) - loss(model, text)
        assert found.importance["loss"][layer] == pytest.approx(rise, rel=1e-4)
        with torch.no_grad():
            ends = [torch.cat([m.hidden(b.ids, starts=b.starts)[0] for b in text]) for m in (small, model)]
        assert found.importance["input"][layer] == pytest.approx(float((ends[0] - ends[1]).square().mean()), rel=1e-4)


def test_the_second_layer_to_go_is_the_least_of_what_the_first_one_left(tmp_path: Path) -> None:
    model, text = teachers.teacher(PATTERN), teachers.batches(2)
    found = score_layers(model, text, rounds=3)
    first, second = found.order[0], found.order[1]
    assert found.importance["mse"][first] == min(found.importance["mse"])
    whole, errors = teachers.logits(model, text), {}
    for layer in set(range(6)) - {first}:
        small = without(model, {first, layer}, tmp_path / str(layer))
        errors[layer] = float((teachers.logits(small, text) - whole).square().mean())
    assert second == min(errors, key=lambda i: errors[i])
    ranks = found.importance["iterative"]
    assert [ranks[i] for i in found.order] == [0, 1, 2] and sorted(ranks) == list(range(6))


def test_dead_layers_are_the_first_to_go() -> None:
    model, text = teachers.teacher(PATTERN), teachers.batches(1)
    with torch.no_grad():
        model.blocks[3].mixer.out_proj.weight.zero_()
        model.blocks[1].mixer.down_proj.weight.zero_()
    for by in ("mse", "input", "loss"):
        found = score_layers(model, text, rounds=2, by=by)
        # a model that was never trained may well predict better without a layer
        assert set(found.order) == {1, 3} or by == "loss"
        assert found.importance[by][1] == found.importance[by][3] == 0
    cosine = score(model, text, axes=["depth"]).layers["cosine"]
    assert {i for i in range(6) if cosine[i] < 1e-12} == {1, 3}


def test_layers_before_the_one_left_out_are_not_computed_again() -> None:
    model, text = teachers.teacher("MMMMM"), teachers.batches(3)
    calls = [0] * 5
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, y, i=i: calls.__setitem__(i, calls[i] + 1))
    score_layers(model, text)
    # the whole model once, each layer on its way, and once for every layer before it that is left out
    assert calls == [3 * (2 + i) for i in range(5)]


def split(model: Hybrid, first: int, share: float) -> None:
    """Make a layer and the one behind it two parts of the first: the same weights, shares of its output."""
    with torch.no_grad():
        model.blocks[first + 1].load_state_dict(model.blocks[first].state_dict())
        for layer, part in ((first, share), (first + 1, 1 - share)):
            for name, p in model.blocks[layer].named_parameters():
                if name.removeprefix("mixer.").startswith(
                    ("out_proj", "o_proj", "down_proj", "experts.down", "shared.d")
                ):
                    p *= part


@pytest.mark.parametrize("pattern", ["MM", "--", "**"])
def test_biases_of_zero_do_not_hide_twins(pattern: str) -> None:
    model = build(
        teachers.config(pattern, mamba2={"proj_bias": True}, mlp={"bias": True}, attention={"out_bias": True}), "fp32"
    )
    split(model, 0, 0.3)
    assert twin_layers(model) == {0: (1, pytest.approx(1 + 0.3 / 0.7, rel=1e-5))}
    with torch.no_grad():
        for block in model.blocks:
            for p in block.mixer.parameters():
                p.zero_()
    # layers that do nothing are twins of which one adds as much as both
    assert list(twin_layers(model)) == [0]


@pytest.mark.parametrize("pattern", ["MM--**", "EE", "MMM"])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_layers_that_were_doubled_are_found_and_merged(pattern: str, share: float, tmp_path: Path) -> None:
    model = teachers.teacher(pattern, init_std=0.1, mlp={"bias": True})
    # a stream that no layer changes much, as in large models: the second part does on it what the first did
    model.embed.weight.data *= 30
    firsts = [i for i in range(0, len(pattern) - 1, 2) if pattern[i] == pattern[i + 1]]
    for first in firsts:
        split(model, first, share)
    assert {i: twin for i, (twin, _) in twin_layers(model).items()} == {i: i + 1 for i in firsts}
    text = teachers.batches(2)
    found = score_layers(model, text, rounds=len(firsts), folder=tmp_path)
    assert set(found.order) == set(firsts) == found.merges.keys()
    scores = score(model, text).with_layers(found)
    scores.save(tmp_path / "scores")
    scores = type(scores).load(tmp_path / "scores")
    kept = tuple(i for i in range(len(pattern)) if i not in firsts)
    source, whole, errors = teachers.checkpoint(model, tmp_path), teachers.logits(model, text), []
    for merge in (True, False):
        small = teachers.student(prune(source, shrunk(model.config, kept), scores, merge=merge))
        errors.append(float((teachers.logits(small, text) - whole).square().mean()))
    assert errors[0] < 0.3 * errors[1]
    # when the last of them went, the model was the one that is cut
    last = json.loads((tmp_path / "layers.json").read_text())["rounds"][-1]["mse"][found.order[-1]]
    assert last == pytest.approx(errors[0], rel=1e-4)


def test_layers_that_are_alike_but_for_a_little_are_no_twins() -> None:
    model = teachers.teacher("MM")
    split(model, 0, 0.5)
    with torch.no_grad():
        model.blocks[1].mixer.conv.weight += 0.05 * torch.randn_like(model.blocks[1].mixer.conv.weight)
    assert not twin_layers(model)


class KilledError(Exception):
    pass


def test_a_search_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, text = teachers.teacher("M-*E"), teachers.batches(2)
    whole = score_layers(model, text, rounds=3, measures=("mse", "loss"))
    for at in range(1, 6):

        def kill(done: int, total: int, at: int = at) -> None:
            assert total == 6
            if done == at:
                raise KilledError

        folder = tmp_path / str(at)
        with pytest.raises(KilledError):
            score_layers(model, text, rounds=3, measures=("mse", "loss"), folder=folder, progress=kill)
        assert score_layers(model, text, rounds=3, measures=("mse", "loss"), folder=folder) == whole
    with pytest.raises(ValueError, match="belongs to another model, text or measure"):
        score_layers(model, teachers.batches(2, seed=8), rounds=3, measures=("mse", "loss"), folder=folder)
    # the loss is of targets
    masked = [replace(batch, targets=torch.full_like(batch.targets, IGNORED)) for batch in text]
    with pytest.raises(ValueError, match="belongs to another model, text or measure"):
        score_layers(model, masked, rounds=3, measures=("mse", "loss"), folder=folder)
    with torch.no_grad():
        model.blocks[3].mixer.router.correction += 1
    with pytest.raises(ValueError, match="belongs to another model, text or measure"):
        score_layers(model, text, rounds=3, measures=("mse", "loss"), folder=folder)


def test_a_search_that_went_on_still_tells_what_fewer_rounds_found(tmp_path: Path) -> None:
    model, text = teachers.teacher(PATTERN), teachers.batches(1)
    score_layers(model, text, rounds=4, folder=tmp_path)
    for rounds in (1, 2, 3):
        assert score_layers(model, text, rounds=rounds, folder=tmp_path) == score_layers(model, text, rounds=rounds)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"identity": {}}', "{", ""])
def test_a_broken_state_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(content)
    with pytest.raises(ValueError, match=r"layers\.json is no state of this search"):
        score_layers(teachers.teacher("M-"), teachers.batches(1), folder=tmp_path)


def test_errors_that_are_no_numbers_order_nothing() -> None:
    model = teachers.teacher("M--", mlp={"sub_norm": False, "gated": False})
    with torch.no_grad():
        model.blocks[1].mixer.up_proj.weight[:] = 1e200
    with pytest.raises(ValueError, match="mse without layer 0 is nan: the model's numbers overflow"):
        score_layers(model, teachers.batches(1))


def test_the_best_layers_of_each_kind_stay() -> None:
    teacher = teachers.config(PATTERN)
    importance = [3.0, 1.0, 0.5, 4.0, 1.0, 0.1]
    assert keep_layers(importance, teacher, {"M": 1, "-": 1, "*": 0}) == (1, 3, 5)
    with pytest.raises(ValueError, match=r"counts\['M'\]=3: the teacher has 2 such layers"):
        keep_layers(importance, teacher, {"M": 3})
    with pytest.raises(ValueError, match=r"counts\['m'\]=1: the teacher has 0 such layers"):
        keep_layers(importance, teacher, {"m": 1})
    with pytest.raises(ValueError, match="importance of 5 layers was given for a teacher of 6"):
        keep_layers(importance[1:], teacher, {"M": 1})


def test_scores_take_layers_along(tmp_path: Path) -> None:
    model, text = teachers.teacher("M-"), teachers.batches(1)
    found = score_layers(model, text)
    scores = score(model, text).with_layers(found)
    scores.save(tmp_path / "scores")
    back = type(scores).load(tmp_path / "scores")
    assert back.layers == {**scores.layers} and set(back.layers) == {"cosine", "mse", "input"}
    assert back.order == found.order and isinstance(found, LayerScores)


def test_searches_that_cannot_be_are_refused() -> None:
    model = teachers.teacher("M-")
    with pytest.raises(ValueError, match="rounds=2: between 1 and 1"):
        score_layers(model, teachers.batches(1), rounds=2)
    with pytest.raises(ValueError, match="measure 'size' is unknown"):
        score_layers(model, teachers.batches(1), by="size")
    with pytest.raises(ValueError, match="no batches"):
        score_layers(model, [])
