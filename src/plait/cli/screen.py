"""The two faces of a chat: a terminal with streaming Markdown, and plain lines for pipes and tests."""

import importlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner
from rich.text import Text

_FENCE = "```"


class Screen(Protocol):
    """What a chat needs to be seen."""

    def ask(self) -> str | None:
        """The next line of the user; None when there are no more."""
        ...

    def tell(self, text: str) -> None:
        """Say something that is not the model's."""
        ...

    def answer(self, pieces: Iterator[str]) -> None:
        """Show an answer as it comes; stops with the pieces."""
        ...


class Lines:
    """Answers on standard output, everything else on standard error."""

    def ask(self) -> str | None:
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removesuffix("\n") if line else None

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def answer(self, pieces: Iterator[str]) -> None:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)


class Terminal:
    """Markdown that grows: whole blocks are printed for good, only the last one is drawn again and again."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        try:
            # history and editing of the line, where the system has it
            importlib.import_module("readline")
        except ImportError:
            self._console.print("[dim]no readline here: arrow keys will not edit[/]")

    def ask(self) -> str | None:
        while True:
            try:
                return input("\n> ")
            except EOFError:
                self._console.print()
                return None
            except KeyboardInterrupt:
                self.tell("Ctrl-D or /quit leaves")

    def tell(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def answer(self, pieces: Iterator[str]) -> None:
        pending = ""
        waiting = Spinner("dots", style="dim")
        with Live(waiting, console=self._console, refresh_per_second=12, transient=True) as live:
            for piece in pieces:
                pending += piece
                done, pending = split_blocks(pending)
                if done:
                    self._console.print(Markdown(done))
                if pending.strip():
                    live.update(self._last(pending))
                elif done:
                    live.update(waiting)
        if pending.strip():
            self._console.print(Markdown(pending))

    def _last(self, pending: str) -> RenderableType:
        # a block taller than the screen cannot be drawn in place: then its end is shown, as it is written
        room = max(self._console.height - 3, 1)
        lines = Text(pending).wrap(self._console, self._console.width)
        return Markdown(pending) if len(lines) <= room else Text("\n").join(lines[-room:])


def split_blocks(text: str) -> tuple[str, str]:
    """Cut Markdown after its last finished block: a blank line outside of fenced code.

    Returns: the finished blocks and the rest; joined they are the text.
    """
    cut = 0
    at = text.find("\n\n")
    while at >= 0:
        if text.count(_FENCE, 0, at) % 2 == 0:
            cut = at + 2
        at = text.find("\n\n", at + 1)
    return text[:cut], text[cut:]
