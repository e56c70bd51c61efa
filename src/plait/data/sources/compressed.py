"""Open a file for reading bytes, unpacked on the way if its name ends in .zst or .gz."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from plait.data.document import SourceError

PACKED = (".zst", ".gz")
# packed bytes per turn; a hostile file grows them 32768-fold at most
_PIECE = 1 << 12


class _ZstReader(io.RawIOBase):
    """A stream that notices a file cut short, which the library's own reader takes for the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._ready:
            packed = self._packed or self._file.read(_PIECE)
            if not packed:
                if not self._fresh:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._ready = memoryview(self._frame.decompress(packed))
            self._packed, self._fresh = b"", False
            if self._frame.eof:
                # files may hold several frames one after another
                self._packed = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._fresh = True
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading in binary.

    Raises: SourceError("corrupt"), also while the block reads, if the packed content is broken or cut short.
    """
    with path.open("rb") as file:
        stream: io.RawIOBase | gzip.GzipFile | BinaryIO = file
        if path.suffix == ".zst":
            stream = _ZstReader(file)
        elif path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        try:
            yield file if stream is file else io.BufferedReader(stream)  # pyright: ignore[reportReturnType, reportArgumentType]
        except (zstandard.ZstdError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise SourceError("corrupt", f"{path} is corrupt or cut short ({error}); copy it again") from error
