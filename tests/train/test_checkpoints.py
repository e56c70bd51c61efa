"""What kills leave among checkpoints: whole folders get their names back, the rest goes."""

from pathlib import Path

import pytest
import torch

from plait.dist import state
from plait.train.checkpoints import Checkpoints


def make(folder: Path, content: int, *, damaged: bool = False) -> Path:
    folder.mkdir(parents=True)
    state.write(folder, {"random": {"x": torch.full((3,), float(content))}}, {"content": content})
    if damaged:
        # the same size, so that only the checksum tells
        data = bytearray((folder / "random.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "random.safetensors").write_bytes(data)
    return folder


def left(folder: Path) -> dict[str, object]:
    return {path.name: (state.facts(path) or {}).get("content") for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("new", "old", "kept"),
    [
        ("whole", "whole", 2),
        ("damaged", "whole", 1),
        ("empty", "whole", 1),
        (None, "whole", 1),
        ("whole", None, 2),
        ("damaged", "damaged", None),
        ("empty", None, None),
    ],
)
def test_a_step_whose_name_is_missing_gets_its_newest_whole_copy_back(
    tmp_path: Path, new: str | None, old: str | None, kept: int | None
) -> None:
    for name, kind, content in ((".step-000004.aa.old", old, 1), (".step-000004.bb.new", new, 2)):
        if kind == "empty":
            (tmp_path / name).mkdir()
        elif kind is not None:
            make(tmp_path / name, content, damaged=kind == "damaged")
    Checkpoints(tmp_path, keep=2).sweep()
    assert left(tmp_path) == ({} if kept is None else {"step-000004": kept})


def test_a_step_that_is_there_stays_and_its_leftovers_go(tmp_path: Path) -> None:
    make(tmp_path / "step-000004", 0)
    make(tmp_path / ".step-000004.aa.old", 1)
    make(tmp_path / ".step-000004.bb.new", 2)
    Checkpoints(tmp_path, keep=2).sweep()
    assert left(tmp_path) == {"step-000004": 0}


def test_a_step_that_was_being_deleted_does_not_come_back(tmp_path: Path) -> None:
    make(tmp_path / ".step-000002.77.gone", 1)
    Checkpoints(tmp_path, keep=2).sweep()
    assert left(tmp_path) == {}


def test_a_folder_that_is_not_there_needs_no_sweeping(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "none", keep=1).sweep()
    assert not (tmp_path / "none").exists()
