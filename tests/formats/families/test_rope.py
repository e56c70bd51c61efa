"""Rotary positions in both spellings; frequencies are held against transformers in stories/test_export.py."""

from pathlib import Path

import pytest

from plait.formats.error import CheckpointError
from plait.formats.families.fields import Fields
from plait.formats.families.rope import read_rope, write_rope
from plait.ops.rope import Rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(**data: object) -> Rope:
    return read_rope(Fields(data, Path("config.json")), 1e4, 2048)


def test_the_base_comes_from_file_or_family() -> None:
    assert read() == Rope(base=1e4)
    assert read(rope_theta=5e5) == Rope(base=5e5)
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 1e6}) == Rope(base=1e6)


def test_old_and_new_spelling_mean_the_same() -> None:
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | LLAMA3)
    older = read(rope_theta=5e5, rope_scaling={"type": "llama3"} | LLAMA3)
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3)
    assert old == older == new == Rope(base=5e5, scaling="llama3", stretch=8, original_context=8192, low=1, high=4)


def test_linear() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 2.5}) == Rope(scaling="linear", stretch=2.5)


def test_yarn_takes_its_defaults_from_the_paper() -> None:
    found = read(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    assert found == Rope(scaling="yarn", stretch=4.0, original_context=512, low=1.0, high=32.0, temperature=None)
    stretched = read(
        max_position_embeddings=2048, rope_scaling={"type": "yarn", "original_max_position_embeddings": 512}
    )
    assert stretched.stretch == 4.0


def test_yarn_temperature_is_given_or_follows_two_scales() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read(rope_scaling=scaling | {"attention_factor": 1.5}).temperature == 1.5
    assert read(rope_scaling=scaling | {"mscale": 1.0, "mscale_all_dim": 1.0}).temperature == 1.0


@pytest.mark.parametrize(
    "rope",
    [
        Rope(base=5e5),
        Rope(scaling="linear", stretch=2.0),
        Rope(scaling="llama3", stretch=8.0, original_context=512),
        Rope(scaling="yarn", stretch=4.0, original_context=512, low=2.0, high=20.0),
        Rope(scaling="yarn", stretch=4.0, original_context=512, high=32.0, temperature=1.25),
    ],
)
@pytest.mark.parametrize("spelling", ("old", "new"))
def test_a_round_trip_is_the_identity(rope: Rope, spelling: str) -> None:
    written = write_rope(rope, "llama")
    names = ("rope_parameters",) if spelling == "new" else ("rope_theta", "rope_scaling")
    back = read(**{name: written[name] for name in names})
    assert back == (
        rope if rope.scaling in ("llama3", "yarn") else Rope(base=rope.base, scaling=rope.scaling, stretch=rope.stretch)
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "truncate": False}}, "truncate = False is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": "yarn"}, "expected a table"),
    ],
)
def test_what_we_do_not_compute_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**data)


@pytest.mark.parametrize("rope", [None, Rope(rotated=0.5)])
def test_what_a_family_cannot_say_is_refused(rope: Rope | None) -> None:
    with pytest.raises(CheckpointError, match="save as native"):
        write_rope(rope, "llama")
