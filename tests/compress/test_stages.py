"""Stages: run once for the same inputs, go on after a kill, run again when something before them changes."""

import json
import os
from pathlib import Path

import pytest

from plait.compress.stages import FILE, Stages, UntilError, check_names, identity_of, key_of
from plait.config import ConfigError


def chain(out: Path, first: str, ran: list[str], **how: object) -> Path:
    """Two stages, the second of which writes what the first did, doubled."""
    stages = Stages(out, **how)  # type: ignore[arg-type]

    def one(folder: Path) -> None:
        ran.append("one")
        (folder / "text").write_text(first)

    before = stages.run("one", {"first": first, "n": (1, 2)}, one)

    def two(folder: Path) -> None:
        ran.append("two")
        (folder / "text").write_text(2 * (before / "text").read_text())

    return stages.run("two-0", {"before": before}, two)


def test_a_stage_runs_once_and_again_when_something_before_it_has_changed(tmp_path: Path) -> None:
    ran: list[str] = []
    first = chain(tmp_path, "a", ran)
    assert (first / "text").read_text() == "aa" and chain(tmp_path, "a", ran) == first and ran == ["one", "two"]
    other = chain(tmp_path, "b", ran)
    assert other != first and (other / "text").read_text() == "bb" and (first / "text").read_text() == "aa"
    assert chain(tmp_path, "a", ran) == first and ran == ["one", "two"] * 2
    facts = json.loads((first / FILE).read_text())
    assert facts["stage"] == "two-0" and facts["inputs"]["before"].startswith("one-")


def test_a_stage_is_made_again_with_those_that_are_made_of_it(tmp_path: Path) -> None:
    ran: list[str] = []
    first = chain(tmp_path, "a", ran)
    (first / "text").write_text("spoilt")
    assert chain(tmp_path, "a", ran, again=["two"]) == first
    assert (first / "text").read_text() == "aa" and ran == ["one", "two", "two"]
    # what is made of it is made again too
    (first / "text").write_text("spoilt")
    assert chain(tmp_path, "a", ran, again=["one"]) == first
    assert (first / "text").read_text() == "aa" and ran[3:] == ["one", "two"]
    del ran[3:]
    with pytest.raises(UntilError, match="stopped after one"):
        chain(tmp_path / "other", "a", ran, until="one")
    assert ran[3:] == ["one"]


def test_a_killed_stage_finds_what_it_left(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        for name in "abc":
            if not (folder / name).exists():
                (folder / name).write_text(name)
                if name == "b" and not (folder / "second").exists():
                    (folder / "second").touch()
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("long", {}, make)
    assert not list((tmp_path / "stages").glob("long-*"))
    before = next((tmp_path / "stages").glob(".long-*.work")) / "a"
    stamp = before.stat().st_mtime_ns
    done = Stages(tmp_path).run("long", {}, make)
    assert (done / "a").stat().st_mtime_ns == stamp and (done / "c").read_text() == "c"
    assert not list((tmp_path / "stages").glob(".*"))


def test_a_removal_that_was_killed_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    first = chain(tmp_path, "a", ran)
    real = os.rename

    def dies(a: Path, b: Path) -> None:
        real(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        chain(tmp_path, "a", ran, again=["two"])
    monkeypatch.undo()
    assert not first.exists()
    Stages(tmp_path).sweep()
    assert len(list((tmp_path / "stages").iterdir())) == 1
    assert chain(tmp_path, "a", ran) == first


def test_keys_depend_on_every_input_and_on_no_order() -> None:
    assert key_of("a", {"x": 1, "y": [2.5]}) == key_of("a", {"y": [2.5], "x": 1})
    assert len({key_of("a", {"x": 1}), key_of("b", {"x": 1}), key_of("a", {"x": 2}), key_of("a", {"y": 1})}) == 4


def test_what_cannot_name_an_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="is no stage's folder"):
        Stages(tmp_path).run("one", {"data": tmp_path}, lambda folder: None)
    with pytest.raises(ConfigError, match="did you mean 'score'"):
        check_names(["scores"], ["profile", "score"], "again")


def test_a_checkpoint_is_its_bytes_wherever_it_lies(tmp_path: Path) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(content)
        (tmp_path / name / "notes.txt").write_text(name)
    a, b, c = (identity_of(tmp_path / name) for name in "abc")
    assert a == b != c
