"""The library offers what a layer can become, and nothing that no model can have."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.compress.teachers import batches, checkpoint, config, teacher

from plait.compress.held import write
from plait.compress.replace import KEEP, NONE, Menu, Replacement, begun, learnt, library, plain
from plait.compress.score import score


def names(row: tuple[Replacement, ...]) -> list[str]:
    return [r.name for r in row]


def test_each_layer_has_itself_narrower_ones_the_other_kind_and_nothing() -> None:
    found = library(config("M-*EM"), Menu(n_heads=(0.8, 0.5, 0.34), head_dim=(0.5,), d_ff=(0.5, 0.25), d_state=(0.6,)))
    # 6 heads in 2 groups: four fifths of them round to 4, as does half, which is offered once
    assert names(found[0]) == [KEEP, "n_heads 4", "n_heads 2", "head_dim 2", "d_state 3", "attention", NONE]
    assert names(found[1]) == [KEEP, "d_ff 12", "d_ff 6", NONE]
    assert names(found[2]) == [KEEP, "n_kv_heads 2", "mamba-2", NONE]
    assert names(found[3]) == [KEEP, "n_experts 4", "n_experts 2", NONE]
    attention, mamba = found[2][1].spec, found[2][2].spec
    assert (attention.n_heads, attention.n_kv_heads) == (4, 2)  # type: ignore[union-attr]
    assert mamba == config().layers[0] and found[2][2].is_fresh and found[0][5].spec == config().layers[2]
    assert [r.learns for r in found[1]] == [False, True, True, False]


def test_a_menu_can_leave_things_out_and_swaps_need_both_kinds() -> None:
    assert [names(row) for row in library(config("M-"), Menu(none=False))] == [
        [KEEP, "n_heads 4", "d_state 2"],
        [KEEP, "d_ff 18", "d_ff 12", "d_ff 6"],
    ]
    assert "attention" not in names(library(config("M-*"), Menu(swaps=False))[0])
    with pytest.raises(ValueError, match="d_ff"):
        Menu(d_ff=(1.5,))


def test_a_swapped_layer_takes_the_most_frequent_size_of_its_kind() -> None:
    base = config("M*MM")
    first, *rest = base.layers
    odd = replace(base, layers=(replace(first, n_heads=2), *rest))  # type: ignore[call-arg]
    assert library(odd)[1][-2].spec == rest[1]


def test_a_replacement_begins_as_a_cut_or_fresh_and_is_read_back_as_it_was(tmp_path: Path) -> None:
    model = teacher("M-*")
    source, scores = checkpoint(model, tmp_path), score(model, batches())
    row = library(model.config)[2]
    recipe = plain(model)
    narrow = begun(source, scores, row[1], recipe, seed=0)
    kept = scores.of("attention_heads", 2).shape
    assert kept[0] == 3 and narrow.mixer.k_proj.weight.shape == (12, 20)
    taken = model.blocks[2].mixer.k_proj.weight.unflatten(0, (3, 6))
    assert all(any(torch.equal(a, b) for b in taken) for a in narrow.mixer.k_proj.weight.unflatten(0, (2, 6)))
    fresh, again, other = (begun(source, scores, row[2], recipe, seed=seed) for seed in (1, 1, 2))
    same = zip(fresh.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same) and all(bool(p.isfinite().all()) for p in fresh.parameters())
    assert not torch.equal(fresh.mixer.in_proj.weight, other.mixer.in_proj.weight)
    file = row[2].file(tmp_path)
    file.parent.mkdir()
    write(file, fresh.state_dict(), {})
    back = learnt(model.config, row[2], tmp_path, recipe)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), back.parameters(), strict=True))
