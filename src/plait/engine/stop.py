"""Turn new tokens into text that may be shown: nothing is shown that could still become a stop text.

A stop text may begin in one token and end in another. Text is held back from the first character that could begin one,
until it does or does not.
"""

from collections.abc import Sequence

from plait.text.reasoning import overlap


class StopGate:
    """Text up to and without the first stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Args: stop: the stop texts."""
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop text has appeared; nothing follows."""

    def add(self, piece: str) -> str:
        """Take the next text; return what is now certain, often ""."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text ended: return what was held back."""
        text, self._held = self._held, ""
        return text
