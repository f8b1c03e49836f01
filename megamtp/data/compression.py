"""Files that may be compressed, as .gz or .zst."""

import gzip
import io
from pathlib import Path
from typing import BinaryIO

from megamtp.data.optional import require

SUFFIXES = (".gz", ".zst")
COMPRESSED_BLOCK_BYTES = 1 << 17
CONTENT_BLOCK_BYTES = 1 << 20
LARGEST_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


def suffix(path: Path) -> str | None:
    """One of SUFFIXES, if the file is compressed."""
    found = path.suffix.lower()
    return found if found in SUFFIXES else None


def open_binary(path: Path) -> BinaryIO:
    """The file's content.

    Reading raises gzip's, zlib's and zstandard's errors if it is damaged, and EOFError if it is cut off.
    Raises InputError: zstandard is not installed.
    """
    found = suffix(path)
    if found == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdStream(path), CONTENT_BLOCK_BYTES) if found == ".zst" else open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """The content of a .zst file of any number of frames. Raises EOFError if the last one is cut off."""

    def __init__(self, path: Path):
        self._library = require("zstandard")
        self._stream = open(path, "rb")  # noqa: SIM115 - closed with this stream
        self._frame, self._compressed, self._content = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            self._compressed = self._compressed or self._stream.read(COMPRESSED_BLOCK_BYTES)
            if not self._compressed:
                if self._frame:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        length = min(len(buffer), len(self._content))
        buffer[:length] = self._content[:length]
        self._content = self._content[length:]
        return length

    def close(self) -> None:
        self._stream.close()
        super().close()
