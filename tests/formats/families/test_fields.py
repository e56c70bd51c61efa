"""Fields of a config: what is asked for is checked, what is almost asked for is named."""

from pathlib import Path

import pytest

from plait.formats.error import CheckpointError
from plait.formats.families.fields import Fields


def fields(**data: object) -> Fields:
    return Fields(data, Path("config.json"))


def test_the_first_name_that_is_there_counts() -> None:
    assert fields(b=2, c=3).whole("a", "b", "c") == 2
    assert fields(a=None, b=2).whole("a", "b") == 2
    assert fields().whole("a", "b", default=7) == 7


def test_booleans_are_no_numbers() -> None:
    with pytest.raises(CheckpointError, match="a = True, expected a whole number"):
        fields(a=True).whole("a")
    with pytest.raises(CheckpointError, match="a = True, expected a number"):
        fields(a=True).number("a")


def test_ids_are_one_or_many_and_negative_means_none() -> None:
    assert fields(a=3).tokens("a") == (3,)
    assert fields(a=[3, 4]).tokens("a") == (3, 4)
    assert fields(a=-1).tokens("a") == () == fields().tokens("a")
    assert fields(a=-1).token("a") is None


def test_another_name_for_what_is_there_is_no_misspelling() -> None:
    asked = fields(n_groups=3, mamba_ngroups=3)
    asked.whole("n_groups", "mamba_n_groups")
    asked.check_spelling()
    asked = fields(mamba_ngroups=3)
    asked.whole("n_groups", "mamba_n_groups", default=8)
    with pytest.raises(CheckpointError, match="unknown key 'mamba_ngroups'; did you mean 'mamba_n_groups'"):
        asked.check_spelling()


def test_only_accepts_absent_null_and_what_is_known() -> None:
    for data in ({}, {"a": None}, {"a": "x"}):
        fields(**data).only("a", "x", why="because")
    with pytest.raises(CheckpointError, match=r"a = 'y' is not supported \(because\); known: 'x'"):
        fields(a="y").only("a", "x", why="because")


def test_the_likeliest_misspelling_is_named() -> None:
    asked = fields(hidden_sizs=1, hidden_sizee=1)
    asked.whole("hidden_size", default=1)
    with pytest.raises(CheckpointError, match="unknown key 'hidden_sizee'"):
        asked.check_spelling()
