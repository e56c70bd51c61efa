"""The learning rate at the corners of every schedule, against the formulae."""

import math

import pytest

from plait.train.schedule import Schedule

PEAK, LOW, W, R, S = 2e-3, 2e-5, 10, 20, 100
SHAPES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}


def wsd(**kwargs: object) -> Schedule:
    return Schedule(**({"peak": PEAK, "warmup_steps": W, "decay_steps": R, "final_ratio": 0.01} | kwargs))  # type: ignore


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_is_linear_then_the_peak_holds_then_the_decay_follows_its_formula(shape: str) -> None:
    schedule = wsd(decay=shape)
    for step in range(W):
        assert schedule.lr(step, S) == pytest.approx(PEAK * (step + 1) / W, rel=1e-12)
    assert all(schedule.lr(step, S) == PEAK for step in range(W - 1, S - R))
    for step in range(S - R, S):
        t = (step + 1 - (S - R)) / R
        assert schedule.lr(step, S) == pytest.approx(LOW + (PEAK - LOW) * SHAPES[shape](t), rel=1e-12)
    assert schedule.lr(S - R, S) < PEAK
    assert schedule.lr(S - 1, S) == pytest.approx(LOW, rel=1e-12)


def test_cosine_decays_from_the_end_of_the_warm_up_to_the_last_step() -> None:
    schedule = Schedule(peak=PEAK, kind="cosine", warmup_steps=W, final_ratio=0.01)
    middle = W + (S - W) // 2 - 1
    assert schedule.lr(W - 1, S) == PEAK
    assert schedule.lr(middle, S) == pytest.approx((PEAK + LOW) / 2, rel=1e-12)
    assert schedule.lr(S - 1, S) == pytest.approx(LOW, rel=1e-12)


def test_lengths_left_out_are_one_and_fifteen_per_cent_of_the_run() -> None:
    assert Schedule().lengths(1000) == (10, 150)


def test_a_decay_left_out_is_1_sqrt() -> None:
    assert [wsd().lr(step, S) for step in range(S)] == [wsd(decay="1-sqrt").lr(step, S) for step in range(S)]


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    schedule = wsd(warmup_steps=0, decay_steps=0)
    assert {schedule.lr(step, 7) for step in range(7)} == {PEAK}


def test_a_run_of_one_step_has_a_rate() -> None:
    assert 0 < Schedule().lr(0, 1) <= 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peak": -1e-3}, "peak=-0.001"),
        ({"peak": 0.0}, "peak=0.0"),
        ({"peak": math.nan}, "peak=nan"),
        ({"final_ratio": 1.5}, "final_ratio=1.5"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"kind": "cosine", "decay_steps": 3}, "decay_steps"),
        ({"kind": "cosine", "decay": "linear"}, "decay"),
        ({"kind": "cosine", "decay": "cosine"}, "decay"),
        ({"kind": "cosine", "decay": "1-sqrt"}, "decay"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**settings)  # type: ignore[arg-type]


def test_phases_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps=10 and decay_steps=20 are longer than the run of 25"):
        wsd().lr(0, 25)


def test_two_stages_are_two_cosines_with_a_drop_between_them() -> None:
    schedule = Schedule(
        peak=PEAK, kind="two-stage", warmup_steps=W, final_ratio=0.0, turn=0.6, before_turn=0.5, after_turn=0.25
    )
    rates = [schedule.lr(step, S) for step in range(S)]
    assert rates[W - 1] == PEAK
    for step in range(W, 60):
        t = (step + 1 - W) / (60 - W)
        assert rates[step] == pytest.approx(PEAK * (0.5 + 0.5 * SHAPES["cosine"](t)), rel=1e-12)
    for step in range(60, S):
        assert rates[step] == pytest.approx(0.25 * PEAK * SHAPES["cosine"]((step + 1 - 60) / 40), abs=1e-15)
    assert (
        rates[59] == pytest.approx(0.5 * PEAK) and rates[60] < 0.25 * PEAK and rates[-1] == pytest.approx(0, abs=1e-15)
    )


def test_weight_decay_rises_to_its_peak_in_the_first_stage_and_is_off_in_the_second() -> None:
    shares = [Schedule(kind="two-stage").weight_decay(step, S) for step in range(S)]
    assert shares[:50] == sorted(shares[:50]) and shares[24] == pytest.approx(0.5) and shares[49] == 1.0
    assert set(shares[50:]) == {0.0}
    assert {Schedule(kind=kind).weight_decay(7, S) for kind in ("wsd", "cosine")} == {1.0}  # type: ignore[arg-type]


def test_stages_left_out_are_those_of_the_docstring() -> None:
    rates = [Schedule(kind="two-stage", peak=1.5e-3, final_ratio=0.0).lr(step, 1000) for step in range(1000)]
    assert rates[9] == 1.5e-3 and rates[499] == pytest.approx(8e-4) and rates[500] == pytest.approx(5e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"turn": 0.5}, "of kind='two-stage'; leave them out with kind='wsd'"),
        ({"kind": "two-stage", "decay_steps": 3}, "leave them out with kind='two-stage'"),
        ({"kind": "two-stage", "turn": 1.5}, "turn=1.5: must lie between 0 and 1"),
        ({"kind": "two-stage", "before_turn": -1.0}, "before_turn=-1.0: must lie between 0 and 1"),
    ],
)
def test_stages_that_do_not_fit_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**settings)  # type: ignore[arg-type]


def test_a_warm_up_beyond_the_drop_is_refused() -> None:
    with pytest.raises(ValueError, match="goes beyond the drop after 50 of 100 steps"):
        Schedule(kind="two-stage", warmup_steps=60).lengths(S)
