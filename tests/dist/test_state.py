"""A state on disk: bits survive, damage shows."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.dist import state

TENSORS = {
    "optimizer": {"a/step": torch.tensor(3.0), "a/exp_avg": torch.randn(5, 7), "empty": torch.zeros(0, 4)},
    "random": {"cpu": torch.get_rng_state(), "half": torch.randn(3).bfloat16()},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "extra.bin").write_bytes(b"12345678")
    state.write(tmp_path, TENSORS, {"step": 7, "rate": 0.1 + 0.2})
    return tmp_path


def test_tensors_and_facts_come_back_bit_for_bit(folder: Path) -> None:
    tensors, facts = state.read(folder)
    assert facts == {"step": 7, "rate": 0.1 + 0.2} == state.facts(folder)
    assert tensors.keys() == TENSORS.keys()
    for stem, named in TENSORS.items():
        assert tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            assert tensor.dtype == tensors[stem][name].dtype and torch.equal(tensor, tensors[stem][name])


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random.safetensors", "state.json", "model/extra.bin"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_any_damage_to_any_file_is_found(folder: Path, name: str, harm: str) -> None:
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "flip":
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=name if harm == "flip" else "no complete state|checksum"):
        state.read(folder)
    if harm != "flip":
        assert state.facts(folder) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state.json": 3}', '{"state.json": [1, 2, 3]}'])
def test_a_marker_that_is_nonsense_makes_no_state(folder: Path, text: str) -> None:
    (folder / state.MARKER).write_text(text)
    assert state.facts(folder) is None
    with pytest.raises(ValueError):
        state.read(folder)


def test_the_generators_state_is_put_back() -> None:
    saved = state.random_state(torch.device("cpu"))
    first = torch.rand(4)
    torch.rand(9)
    state.set_random_state(saved, torch.device("cpu"))
    assert torch.equal(first, torch.rand(4))


def test_no_file_is_a_pickle(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.is_file():
            assert path.suffix in (".safetensors", ".bin")


LIMITED = """
import resource, sys, torch
from pathlib import Path
from plait.dist import state
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    state.write(Path(sys.argv[1]), {"big": {"x": torch.zeros(100_000)}}, {})
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_file_that_cannot_grow_is_an_error_of_the_system_with_its_name(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(errno.EFBIG), str(tmp_path / "big.safetensors")], result.stderr
