"""The number of steps follows from measured speed, the text's length and the time."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from rich.console import Console

from plait.cli.chapters.pace import LEAST_STEPS, MOST_EPOCHS, SHARE, steps_within
from plait.cli.chapters.story import FULL, Story, Text
from plait.report import Report
from plait.train.pretrain import NextToken


def story(minutes: float) -> Story:
    return Story(
        text=None,
        collected=Text(documents=[], n_files=0, total_bytes=0, skipped=Counter()),
        out=Path(),
        minutes=minutes,
        seed=0,
        scale=FULL,
        report=Report("t"),
        console=Console(),
    )


def objective(per_epoch: int = 10**6) -> NextToken:
    loader = SimpleNamespace(n_steps_per_epoch=lambda: per_epoch)
    batch = SimpleNamespace(ids=torch.zeros(FULL.batch_size, 1))
    return cast(NextToken, SimpleNamespace(loader=loader, validation=lambda: [batch]))


def test_both_models_fit_the_time_together() -> None:
    steps = steps_within(story(4), objective(), {"a": 0.3, "b": 0.2})
    assert 0.95 * 240 * SHARE < steps * 0.5 < 240 * SHARE


def test_a_machine_half_as_fast_makes_half_the_steps() -> None:
    fast, slow = (steps_within(story(4), objective(), {"a": s, "b": s}) for s in (0.2, 0.4))
    assert abs(fast - 2 * slow) <= 4


def test_time_that_has_passed_is_not_spent_again() -> None:
    late = replace_began(story(4), 120)
    assert steps_within(late, objective(), {"a": 0.5}) * 0.5 < 120 * SHARE


def replace_began(told: Story, seconds: float) -> Story:
    told.began = time.monotonic() - seconds
    return told


def test_short_texts_are_not_read_too_often_and_slow_machines_still_train() -> None:
    assert steps_within(story(4), objective(per_epoch=3), {"a": 0.01}) == 3 * MOST_EPOCHS
    assert steps_within(story(0.01), objective(), {"a": 60.0}) == LEAST_STEPS
    small = story(4)
    small.scale = replace(FULL, max_steps=5)
    assert steps_within(small, objective(), {"a": 0.01}) == 5
