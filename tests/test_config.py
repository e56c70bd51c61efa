"""Settings are read strictly: what is wrong is named, with its place, its value and what would be right."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.config import ConfigError, bytes_of, from_dict, load, nearest, read_fields, to_dict, write_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr = {self.lr} must be positive")


@dataclass(frozen=True, slots=True)
class Celsius:
    """Reads and writes itself as one word."""

    degrees: float

    @classmethod
    def from_dict(cls, data: object) -> "Celsius":
        if not isinstance(data, str) or not data.endswith("C"):
            raise ValueError(f"{data!r} is no temperature, write 20C")
        return read_fields(cls, {"degrees": float(data[:-1])})

    def to_dict(self) -> str:
        return f"{write_fields(self)['degrees']}C"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    name: str
    steps: int = 10
    compiled: bool = True
    clip: float | None = None
    label: str | None = None
    out: Path = Path("runs")
    seeds: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    optim: Optim = Optim()
    phases: tuple[Optim, ...] = ()
    heat: Celsius | None = None
    size: int | str = 0
    level: Literal[1, "auto"] = 1


FULL = Run(
    name="a",
    steps=3,
    compiled=False,
    clip=1.0,
    label="x",
    out=Path("a/b"),
    seeds=(1, 2),
    weights={"code": 0.5},
    optim=Optim(lr=2.0, kind="muon", betas=(0.1, 0.2)),
    phases=(Optim(lr=3.0), Optim(lr=4.0)),
    heat=Celsius(20.0),
    size="big",
)


def test_what_is_written_is_read_back_the_same() -> None:
    written = json.loads(json.dumps(to_dict(FULL)))
    assert from_dict(Run, written) == FULL
    assert written["heat"] == "20.0C"
    assert written["out"] == "a/b"


def test_nothing_that_is_none_by_default_is_written() -> None:
    assert "clip" not in to_dict(Run(name="a"))
    assert from_dict(Run, to_dict(Run(name="a"))) == Run(name="a")


def test_a_whole_number_is_a_float_too() -> None:
    clip = from_dict(Run, {"name": "a", "clip": 1}).clip
    assert clip == 1.0 and isinstance(clip, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, '"name" is missing; expected str'),
        ({"name": "a", "stpes": 3}, 'unknown key "stpes"; did you mean "steps"?'),
        ({"name": "a", "optim": {"zzz": 1}}, 'unknown key "optim.zzz"; known keys: lr, kind, betas'),
        ({"name": "a", "phases": [{}, {"l_r": 1}]}, 'unknown key "phases.1.l_r"; did you mean "lr"?'),
        ({"name": 3}, "name = 3: expected str"),
        ({"name": "a", "steps": 3.0}, "steps = 3.0: expected int"),
        ({"name": "a", "steps": True}, "steps = True: expected int"),
        ({"name": "a", "compiled": 1}, "compiled = 1: expected bool"),
        ({"name": "a", "clip": "big"}, "clip = 'big': expected float"),
        ({"name": "a", "clip": True}, "clip = True: expected float"),
        ({"name": "a", "size": 1.5}, "size = 1.5: expected int or str"),
        ({"name": "a", "level": True}, 'level = True: expected one of 1, "auto"'),
        ({"name": "a", "seeds": 3}, "seeds = 3: expected a list of int"),
        ({"name": "a", "seeds": [1, "b"]}, "seeds.1 = 'b': expected int"),
        ({"name": "a", "weights": {"code": "x"}}, "weights.code = 'x': expected float"),
        ({"name": "a", "weights": 3}, "weights = 3: expected a table of float"),
        ({"name": "a", "optim": 3}, "optim = 3: expected a table with keys lr, kind, betas"),
        ({"name": "a", "optim": {"betas": [1]}}, "optim.betas = [1]: expected a list of float, float"),
        (
            {"name": "a", "optim": {"kind": "adam"}},
            'optim.kind = \'adam\': expected one of "adamw", "muon"; did you mean "adamw"?',
        ),
        ({"name": "a", "optim": {"lr": -1}}, "optim: lr = -1.0 must be positive"),
        ({"name": "a", "heat": "20F"}, "heat: '20F' is no temperature, write 20C"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data)
    assert str(caught.value) == message


def test_none_is_a_word_only_where_no_text_may_stand() -> None:
    run = from_dict(Run, {"name": "none", "clip": "none", "label": "none"})
    assert (run.name, run.clip, run.label) == ("none", None, "none")


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text('name = "a"\nsteps = 5\n[optim]\nlr = 1.0\n[[phases]]\nlr = 2.0\n')
    words = ["steps=7", "optim.kind=muon", "optim.lr=3e-4", "phases.0.lr=9", "seeds=[1, 2]", "label=two words"]
    run = load(Run, recipe, words)
    assert (run.name, run.steps, run.seeds, run.label) == ("a", 7, (1, 2), "two words")
    assert run.optim == Optim(kind="muon", lr=3e-4)
    assert run.phases == (Optim(lr=9.0),)


def test_overrides_alone_are_enough() -> None:
    assert load(Run, None, ["name=a", "optim.lr=2", "compiled=false"]) == Run(
        name="a", optim=Optim(lr=2.0), compiled=False
    )


def test_json_is_read_like_toml(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "a", "clip": null, "optim": {"lr": 2}}')
    assert load(Run, tmp_path / "run.json", []) == Run(name="a", optim=Optim(lr=2.0))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps", "'steps' is not an override; write key=value, for example optim.lr=3e-4"),
        ("optim..lr=3", "'optim..lr=3' is not an override; write key=value, for example optim.lr=3e-4"),
        ("=3", "'=3' is not an override; write key=value, for example optim.lr=3e-4"),
        ("name.first=3", "'name.first=3': \"first\" lies below 'a', which is no table"),
        ("seeds.2=3", "'seeds.2=3': \"2\" is no place in a list of 2; counting starts at 0"),
        ("seeds.x=3", "'seeds.x=3': \"x\" is no place in a list of 2; counting starts at 0"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, word: str, message: str) -> None:
    (tmp_path / "run.toml").write_text('name = "a"\nseeds = [1, 2]\n')
    with pytest.raises(ConfigError) as caught:
        load(Run, tmp_path / "run.toml", [word])
    assert str(caught.value) == message


def test_a_line_break_in_an_override_adds_no_second_key() -> None:
    assert load(Run, None, ["name=1\nsteps=7"]) == Run(name="1\nsteps=7")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"name = ", "is not valid TOML"),
        ("a.toml", b'name = "a"\nname = "b"', "is not valid TOML"),
        ("a.json", b'{"name": ', "is not valid JSON"),
        ("a.json", b'{"name": "a", "name": "b"}', 'key "name" appears twice'),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.json", b"[1]", "expected a table of settings, found a list"),
        ("a.json", b"\xff\xfe", "is not valid JSON"),
        ("a.yaml", b"name: a", "settings end in .toml or .json, not '.yaml'"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(Run, tmp_path / name, [])
    assert message in str(caught.value) and name in str(caught.value)


def test_values_that_no_file_can_hold_are_not_written() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        to_dict({"a": {1, 2}})


def test_the_nearest_name_is_what_was_meant() -> None:
    assert nearest("Learning-Rate", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("chta", ["chat", "train"]) == "chat"
    assert nearest("zzz", ["chat", "train"]) is None


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("22GiB", 22 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("64k", 64_000),
        ("10b", 10),
        ("1_000", 1000),
        (4096, 4096),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_read_in_bytes(text: str | int, n_bytes: int) -> None:
    assert bytes_of(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "22GiBs", "-1GB", "inf", "nan", "twelve", "1e999 GB", -5, True])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size in bytes"):
        bytes_of(text)


@given(
    st.builds(
        Run,
        name=st.text(),
        steps=st.integers(),
        clip=st.none() | st.floats(allow_nan=False),
        label=st.none() | st.text(),
        seeds=st.lists(st.integers()).map(tuple),
        weights=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
        optim=st.builds(Optim, lr=st.floats(min_value=1e-300, max_value=1e300)),
    )
)
def test_any_settings_survive_writing_and_reading(run: Run) -> None:
    assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


def test_infinity_is_a_number_in_an_override() -> None:
    assert load(Run, None, ["name=a", "clip=inf"]).clip == math.inf
