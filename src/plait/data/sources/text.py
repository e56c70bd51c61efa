"""Plain text files of any kind: a file is a document, a very large file several."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from plait.data.document import Document, Skipped, SourceError
from plait.data.sources.compressed import open_bytes

_SNIFF = 1 << 13
_PIECE = 1 << 24


def read(path: Path, field: str, skipped: Skipped) -> Iterator[Document]:
    """Yield the text of a UTF-8 file, unchanged; beyond 16 MiB it is cut after line ends.

    Args:
        path: the file (.zst and .gz are unpacked).
        field: not used; plain text has no fields.
        skipped: counts a file that is empty.

    Raises: SourceError("binary" or "undecodable") naming the place of the first byte that is no text.
    """
    empty = True
    utf8 = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as file:
        if (place := file.peek(_SNIFF)[:_SNIFF].find(0)) >= 0:
            raise SourceError("binary", f"{path} is binary (a zero byte at {place}); name text, JSONL or Parquet files")
        seen = 0
        while piece := file.read(_PIECE):
            # up to the end of the line, or one piece more of a line that does not end
            piece += file.readline(_PIECE)
            held = len(utf8.getstate()[0])
            text = _decode(utf8, piece, path, seen - held)
            if seen == 0:
                text = text.removeprefix("\ufeff")
            seen += len(piece)
            if text.strip():
                empty = False
                yield Document(text=text)
        _decode(utf8, b"", path, seen - len(utf8.getstate()[0]))
    if empty:
        skipped["empty"] += 1


def _decode(utf8: codecs.IncrementalDecoder, piece: bytes, path: Path, origin: int) -> str:
    try:
        return utf8.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], origin + error.start
        raise SourceError(
            "undecodable", f"{path} is not UTF-8 (byte 0x{byte:02x} at {place}); convert it, for example with iconv"
        ) from error
