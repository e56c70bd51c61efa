"""What a run's metrics come to: its final loss, its first, and how long it took."""

import pytest

from plait.cli.sweeps.trial import _result


def rows(*steps: int, **last: object) -> list[dict[str, object]]:
    """Lines of metrics.jsonl: losses 10 / step, 100 tokens a step at 50 tokens/s."""
    found = [{"step": s, "loss": 10 / s, "tokens": 100 * s, "tokens_per_s": 50.0} for s in steps]
    return [*found[:-1], {**found[-1], **last}]


def test_a_finished_run_has_its_validation_loss_or_the_mean_of_the_last_tenth() -> None:
    found = _result(rows(*range(1, 21), validation_loss=0.4), "")
    assert (found.status, found.loss, found.first_loss, found.step) == ("finished", 0.4, 10.0, 20)
    assert (found.seconds, found.tokens_per_s) == (40.0, 50.0)
    assert _result(rows(*range(1, 21)), "").loss == pytest.approx((10 / 19 + 10 / 20) / 2)


def test_steps_that_were_left_out_have_no_say_in_the_loss() -> None:
    left = {"step": 20, "loss": 99.0, "tokens": 2000, "tokens_per_s": 50.0, "applied": False}
    found = _result([*rows(*range(1, 21)), left], "")
    assert found.loss is not None and found.loss < 1 and found.step == 20


def test_a_final_loss_that_is_no_number_is_a_divergence() -> None:
    found = _result(rows(1, 2, validation_loss="nan"), "")
    assert (found.status, found.loss, found.reason) == ("diverged", None, "the final loss is nan")
    assert _result([], "at once").first_loss is None


def test_the_first_loss_is_unknown_where_the_first_step_was_not_logged() -> None:
    assert _result(rows(10, 20), "").first_loss is None
