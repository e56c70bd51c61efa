"""Turn new tokens into text that may be shown: nothing is shown that could still become a stop text.

A stop text may begin in one token and end in another. Text is held back from the first character that could begin one,
until it does or does not.
"""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Ids in, certain characters out; see plait.text.stream."""

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class TextGate:
    """Text of one answer, up to and without the first stop text."""

    def __init__(self, decoder: Decoder | None, stop: Sequence[str]) -> None:
        """
        Args:
            decoder: a fresh stream of the tokenizer; None where there is none, and then there is no text.
            stop: the stop texts.
        """
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop text has appeared; nothing follows."""

    def add(self, token_id: int) -> str:
        """Take the next id; return the text that is now certain, often ""."""
        if self._decoder is None or self.stopped:
            return ""
        return self._pass(self._decoder.add(token_id))

    def finish(self) -> str:
        """The answer ended: return what was held back."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._pass(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _pass(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`, in characters."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
