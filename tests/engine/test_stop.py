"""Held-back text: what is shown, joined, is the text before the first stop, however it is cut into tokens."""

import random

import pytest

from plait.engine.answer import Answer
from plait.text.reasoning import Marks


class Letters:
    """A decoder whose ids are indices into a list of pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def add(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return ""


def shown(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    answer = Answer(Letters(pieces), stop)
    out = [answer.add(i)[1] for i in range(len(pieces))]
    return [*out, answer.finish()[1]], answer.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "stopped"),
    [
        (["ab", "EN", "D", "cd"], ("END",), "ab", True),
        (["ab", "EN", "d"], ("END",), "abENd", False),
        (["abE", "N"], ("END",), "abEN", False),
        (["aENDb"], ("END",), "a", True),
        (["aa", "ab"], ("aab",), "a", True),
        (["x", "\n", "\n", "y"], ("\n\n",), "x", True),
        (["stop"], ("stop",), "", True),
        (["one two"], ("two", "ne"), "o", True),
        (["a", "b"], (), "ab", False),
    ],
)
def test_text_ends_before_a_stop(pieces: list[str], stop: tuple[str, ...], text: str, stopped: bool) -> None:
    out, found = shown(pieces, stop)
    assert ("".join(out), found) == (text, stopped)


def test_only_what_could_become_a_stop_is_held_back() -> None:
    out, _ = shown(["hello E", "N", "x", " E"], ("END",))
    assert out == ["hello ", "", "ENx", " ", "E"]


def test_any_cut_of_any_text_gives_what_the_whole_text_gives() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stop = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
        pieces, rest = [], text
        while rest:
            n = rng.randrange(1, 4)
            pieces.append(rest[:n])
            rest = rest[n:]
        out, stopped = shown(pieces, (stop,))
        assert "".join(out) == text.partition(stop)[0]
        assert stopped == (stop in text)


def test_without_a_decoder_there_is_no_text() -> None:
    answer = Answer(None, ())
    assert answer.add(3) == answer.finish() == ("", "")


def test_a_stop_text_inside_of_reasoning_means_nothing() -> None:
    pieces = ["think ST", "OP on</th", "ink>\n\nso ST", "OP on"]
    answer = Answer(Letters(pieces), ("STOP",), marks=Marks(), is_open=True)
    parts = [answer.add(i) for i in range(4)]
    assert "".join(r for r, _ in parts) == "think STOP on"
    assert "".join(t for _, t in parts) == "so "
    assert answer.stopped
