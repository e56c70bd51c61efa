"""`plait bench` refuses what a bench has no use for."""

import inspect
import re

import pytest

from plait.cli.bench import PEERS, USERS, Inputs
from plait.cli.benches import BENCHES


@pytest.mark.parametrize(
    ("what", "flags", "users"),
    [
        ("twin", {"against": ("transformers",)}, "`plait bench ops`, `plait bench train`"),
        ("train", {"depth": (16,)}, "`plait bench decode`, `plait bench twin`"),
        ("decode", {"tokens": (16,)}, "`plait bench ops`, `plait bench prefill`, `plait bench device --tune`"),
        ("device", {"model": "45m"}, "`plait bench device --tune`"),
        ("decode", {"chart": "x.svg"}, "`plait bench twin`"),
        ("train", {"against": ("llama.cpp",)}, "`plait bench prefill`, `plait bench decode`"),
        ("decode", {"against": ("fla",)}, "`plait bench ops`"),
    ],
    ids=str,
)
def test_a_flag_without_use_names_the_benches_that_take_it(what: str, flags: dict, users: str) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(flags))}.* means nothing to `plait bench {what}`") as error:
        Inputs(what=what, **flags)
    assert users in str(error.value)


def test_flags_with_a_use_pass() -> None:
    assert Inputs(what="device", tune=True, model="45m", tokens=(64,)).tokens == (64,)
    assert Inputs(what="twin", depth=(0,), batch=2, steps=3, chart="x.svg", rounds=2, threads=1).chart == "x.svg"
    assert Inputs(what="ops", against=("fla",), tokens=(8,)).against == ("fla",)


def test_the_table_names_flags_and_benches_that_exist() -> None:
    names = set(inspect.signature(Inputs).parameters)
    assert set(USERS) <= names
    for users in (*USERS.values(), *PEERS.values()):
        assert {re.sub(" --tune", "", user) for user in users} <= set(BENCHES)
