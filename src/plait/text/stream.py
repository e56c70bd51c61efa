"""Turn token ids into text one by one, without ever showing half a character.

The pieces that `add` and `finish` return, joined, equal the decoding of all ids at once. Two decoders do this exactly:
a byte-level vocabulary names bytes, so an incremental UTF-8 decoder is enough; any other vocabulary is decoded in a
sliding window, and runs of byte tokens (`<0xE2>`) wait for their end because the library judges a run as a whole.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


class StreamDecoder(Protocol):
    """What both decoders offer: ids in, finished characters out."""

    def add(self, token_id: int) -> str:
        """Take the next id; return the characters that are now certain (often "", never half a character)."""
        ...

    def finish(self) -> str:
        """Return what is still held back (cut characters as U+FFFD) and start afresh."""
        ...


def _byte_of_character() -> dict[str, int]:
    # the GPT-2 alphabet: printable Latin-1 bytes stand for themselves, the other 68 follow from U+0100 upwards
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for (added tokens outside the alphabet: their UTF-8)."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def plain_bytes(token: str) -> bytes:
    """The same of a vocabulary that writes spaces as a low line of its own and single bytes as `<0x0A>`."""
    return bytes([int(token[3:5], 16)]) if _BYTE_TOKEN.match(token) else token.replace("\u2581", " ").encode("utf-8")


class ByteStream:
    """Streaming decoder of byte-level vocabularies."""

    def __init__(self, token_of: Callable[[int], str | None], hidden: Iterable[int]) -> None:
        """
        Args:
            token_of: id -> token, None for an unknown id (which decodes to nothing).
            hidden: ids that decoding leaves out (special tokens).
        """
        self._token_of = token_of
        self._hidden = frozenset(hidden)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        token = None if token_id in self._hidden else self._token_of(token_id)
        return "" if token is None else self._utf8.decode(token_bytes(token))

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowStream:
    """Streaming decoder of every other vocabulary: decode the last piece twice, without and with the new ids."""

    def __init__(
        self, token_of: Callable[[int], str | None], hidden: Iterable[int], decode: Callable[[list[int]], str]
    ) -> None:
        """
        Args:
            token_of, hidden: as for ByteStream.
            decode: ids -> text, the library's own.
        """
        self._token_of = token_of
        self._hidden = frozenset(hidden)
        self._decode = decode
        self._shown: list[int] = []
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        token = None if token_id in self._hidden else self._token_of(token_id)
        if token is None:
            return ""
        self._held.append(token_id)
        return "" if _BYTE_TOKEN.match(token) else self._release()

    def finish(self) -> str:
        text = self._release() if self._held else ""
        self._shown, self._held = [], []
        return text

    def _release(self) -> str:
        # the ids shown last give the context that decoders look at (a leading space, a word in the making)
        before = self._decode(self._shown) if self._shown else ""
        text = self._decode(self._shown + self._held)[len(before) :]
        self._shown, self._held = self._held, []
        return text
