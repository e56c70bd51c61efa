"""Plans: what no cut can make is refused by name, before anything is read."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.compress import teachers

from plait.compress.plan import Plan, check, shrunk, whole

TEACHER = teachers.config("M-*E")


def test_plans_come_back_from_json() -> None:
    plan = shrunk(TEACHER, (0, 2), d_model=12, sizes={"M": {"n_heads": 2}, 2: {"n_kv_heads": 1, "n_heads": 2}})
    plan = replace(plan, replaced={2: Path("library/2.safetensors")})
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.config.pattern == "M*" and plan.config.d_model == 12
    with pytest.raises(ValueError, match="a plan has kept"):
        Plan.from_dict({"layers": 3})


def test_sizes_of_a_layer_win_over_those_of_its_kind() -> None:
    plan = shrunk(teachers.config("--"), sizes={"-": {"d_ff": 9}, 1: {"d_ff": 5}})
    assert [spec.d_ff for spec in plan.config.layers] == [9, 5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sizes": {"M": {"n_heads": 8}}}, "layer 0: n_heads=8 is not within 1 and the teacher's 6"),
        ({"sizes": {"M": {"n_heads": 3}}}, "n_groups=2 does not divide n_heads=3"),
        ({"sizes": {"M": {"n_groups": 1}}}, "layer 0: no cut changes n_groups from 2 to 1; n_heads, head_dim, d_state"),
        ({"sizes": {"-": {"width": 8}}}, "layer 1 \\(MLP\\) has no size 'width'; it has"),
        ({"sizes": {"*": {"head_dim": 4}}}, "layer 2: no cut changes head_dim from 6 to 4"),
        ({"sizes": {"*": {"n_kv_heads": 2}}}, "2 does not divide 3"),
        ({"sizes": {"E": {"n_experts": 1}}}, "n_chosen=2 exceeds the 1 experts"),
        ({"sizes": {"m": {"n_heads": 2}}}, "sizes of 'm': give a letter, one of M"),
        ({"sizes": {4: {"d_ff": 2}}}, "sizes of 4: give a letter, .* or a layer, 0 to 3"),
        ({"sizes": {"E": {"d_shared": 0}}}, "layer 3: d_shared=0 would take the shared expert away"),
        ({"d_model": 21}, "d_model=21: must be 1 to the teacher's 20"),
        ({"kept": (2, 1)}, r"kept=\[2, 1\]: give layers of the teacher, 0 to 3, ascending"),
        ({"kept": (0, 4)}, r"kept=\[0, 4\]"),
        ({"kept": ()}, r"kept=\[\]"),
    ],
)
def test_what_no_cut_can_make_is_refused(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrunk(TEACHER, **how)


def test_plans_of_another_teacher_are_refused() -> None:
    plan = whole(TEACHER)
    for changed, message in (
        (replace(plan, config=replace(TEACHER, vocab_size=38)), "vocab_size=38: a cut keeps the teacher's, 37"),
        (replace(plan, kept=(0, 1)), "the plan keeps 2 layers, its config has 4"),
        (
            replace(plan, config=replace(TEACHER, layers=TEACHER.layers[::-1])),
            "layer 0 is Mamba-2 and cannot be cut to",
        ),
        (replace(plan, replaced={7: Path("x")}), "replaced names layer 7, which is not kept"),
    ):
        with pytest.raises(ValueError, match=message):
            check(changed, TEACHER)
    sigma = teachers.config("-", mlp={"sigma_reparam": True})
    check(whole(sigma), sigma)
    with pytest.raises(ValueError, match="layer 0 has sigma_reparam=true"):
        shrunk(sigma, sizes={"-": {"d_ff": 3}})
