"""New tokens to the two texts of an answer, reasoning and what is said; stop texts end the latter only.

Nothing is shown that could still become a mark or a stop text.
"""

from collections.abc import Sequence
from typing import Protocol

from plait.engine.stop import StopGate
from plait.text.reasoning import Marks, Split


class Decoder(Protocol):
    """Ids in, certain characters out; see plait.text.stream."""

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Answer:
    """Ids in, (reasoning, text) out."""

    def __init__(
        self,
        decoder: Decoder | None,
        stop: Sequence[str] = (),
        *,
        marks: Marks | None = None,
        is_open: bool = False,
    ) -> None:
        """
        Args:
            decoder: a fresh stream of the tokenizer that shows marks, such as MarkStream; None where there is no
                tokenizer, and then there is no text.
            stop: texts that end the answer; inside of reasoning they mean nothing.
            marks: of reasoning, None where none is looked for.
            is_open: it begins inside of reasoning.
        """
        self._decoder = decoder
        self._split, self._gate = Split(marks, is_open=is_open), StopGate(stop)

    @property
    def stopped(self) -> bool:
        """A stop text has appeared; nothing follows."""
        return self._gate.stopped

    def add(self, token_id: int) -> tuple[str, str]:
        """Take the next id; return the reasoning and the text that are now certain, often both ""."""
        if self._decoder is None or self.stopped:
            return "", ""
        reasoning, text = self._split.add(self._decoder.add(token_id))
        return reasoning, self._gate.add(text)

    def finish(self) -> tuple[str, str]:
        """The answer ended: return what was held back."""
        if self._decoder is None or self.stopped:
            return "", ""
        reasoning, text = self._split.add(self._decoder.finish())
        rest = self._split.finish()
        text = self._gate.add(text + rest[1])
        return reasoning + rest[0], text + self._gate.finish()
