"""Sampling settings refuse what makes no sense."""

import math

import pytest

from plait.engine.request import Completion, FinishReason, Sampling, Timings, Usage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", 3),
        ("logit_bias", {-1: 1.0}),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 0.5),
        ("stop", ("ok", "")),
        ("stop_ids", (3, -1)),
    ],
)
def test_a_senseless_setting_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}.*=.*expected"):
        Sampling(**{field: value})  # pyright: ignore[reportArgumentType]


def test_a_bare_stop_text_is_one_stop_and_settings_stay_hashable() -> None:
    assert Sampling(stop="END").stop == ("END",)  # pyright: ignore[reportArgumentType]
    assert hash(Sampling(stop=["a", "b"], stop_ids=[1])) == hash(Sampling(stop=("a", "b"), stop_ids=(1,)))  # pyright: ignore


def test_decode_speed_counts_the_tokens_after_the_first() -> None:
    def completion(n: int) -> Completion:
        return Completion(
            text="",
            token_ids=[1] * n,
            finish_reason=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=1, completion_tokens=n),
            prompt_ids=[1],
            timings=Timings(prefill_s=1.0, decode_s=2.0),
        )

    assert completion(11).decode_tokens_per_s == 5.0
    assert completion(1).decode_tokens_per_s == 0.0
    assert completion(1).finish_reason == "length"


def test_a_bias_names_its_id_when_it_is_too_large() -> None:
    with pytest.raises(ValueError, match=r"logit_bias\[5\]=101"):
        Sampling(logit_bias={5: 101})
    assert Sampling(logit_bias={5: 2, 1: -3.5}).logit_bias == ((1, -3.5), (5, 2))
