"""How long the chapter of fewer bits may train, and how many bits it says a weight takes."""

import pytest
from tests.cli.chapters.test_pace import replace_began, story
from tests.train.tiny import tiny_config

from plait.cli.chapters.bits import LEAST, MOST, OF_LEFT, bits_of, steps_within
from plait.cli.chapters.story import FULL
from plait.model.config import ModelConfig
from plait.model.hybrid import build


def test_training_takes_a_share_of_what_is_left_within_bounds() -> None:
    for passed, budget in ((0, MOST * 240), (200, OF_LEFT * 40), (239, LEAST * 240), (500, LEAST * 240)):
        steps = steps_within(replace_began(story(4), passed), 0.1)
        assert steps * 0.1 == pytest.approx(budget, abs=0.2), passed
    assert steps_within(story(4), 1e-6) == FULL.max_steps and steps_within(story(0.01), 9.0) == 4


def test_bits_of_a_weight_count_scales_and_rows_that_stay_high() -> None:
    assert bits_of(build(tiny_config(), "bf16")) == 32
    sizes = {"vocab_size": 64, "d_model": 256, "mlp": {"d_ff": 512}}
    config = ModelConfig.from_pattern("--", **sizes)
    assert bits_of(build(config, "int8-64")) == pytest.approx(8 + 16 / 64)
    assert bits_of(build(config, "int4-64")) == pytest.approx(4 + 16 / 64)
    # a float32 scale for each row: two matrices of 512 x 256 weights and 512 + 256 rows
    assert bits_of(build(config, "ternary-packed")) == pytest.approx(2 + 32 * 768 / (2 * 512 * 256))
