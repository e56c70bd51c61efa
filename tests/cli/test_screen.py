"""The faces of a chat: Markdown is cut only where a block has ended, and nothing of an answer is lost."""

import io
import sys

import pytest
from rich.console import Console

from plait.cli.screen import Lines, Terminal, split_blocks


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\n", "one\n\n"),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\nthr", "one\n\ntwo\n\n"),
        ("```py\na\n\nb", ""),
        ("```py\na\n\nb\n```\n\nx", "```py\na\n\nb\n```\n\n"),
        ("one\n\n```\na\n\nb", "one\n\n"),
    ],
)
def test_markdown_is_cut_after_blocks_and_never_inside_code(text: str, done: str) -> None:
    assert split_blocks(text) == (done, text.removeprefix(done))


def test_a_terminal_shows_every_block_once() -> None:
    page = io.StringIO()
    console = Console(file=page, force_terminal=False, width=60, height=10)
    code = "\n".join(f"line{i}" for i in range(30))
    pieces = ["# Ti", "tle\n", "\nsome **bold** words\n\n- a\n- b\n\n", f"```\n{code}\n", "```", "\n\nlast"]
    Terminal(console).answer(iter(pieces))
    shown = page.getvalue()
    for word in ("Title", "some bold words", "• a", "line0", "line29", "last"):
        assert shown.count(word + "\n") + shown.count(word + " ") == 1, word


def test_lines_end_an_answer_even_when_it_is_broken_off(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces():  # noqa: ANN202
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lines().answer(pieces())
    assert capsys.readouterr().out == "half\n"


def test_lines_end_with_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nlast"))
    assert [Lines().ask() for _ in range(4)] == ["one", "", "last", None]
    monkeypatch.setattr(sys, "stdin", None)
    assert Lines().ask() is None
