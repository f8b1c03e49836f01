"""Files that may be compressed, as .gz, .bz2, .xz or .zst.

Tests: tests/unit/data/test_records.py.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megamtp.data.optional import require

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMPRESSED_BLOCK_BYTES = 1 << 17
CONTENT_BLOCK_BYTES = 1 << 20
LARGEST_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


class Decompressor(Protocol):
    """Decompresses one frame; bzip2 and xz call it a stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd_decompressor() -> Decompressor:
    return require("zstandard").ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd_decompressor,
}
SUFFIXES = (".gz", *DECOMPRESSORS)


def suffix(path: Path) -> str | None:
    """One of SUFFIXES, if the file is compressed."""
    found = path.suffix.lower()
    return found if found in SUFFIXES else None


def open_binary(path: Path) -> io.BufferedIOBase:
    """The file's content.

    Reading raises the libraries' errors if it is damaged, EOFError if it is cut off, and InputError if a library is not
    installed.
    """
    found = suffix(path)
    if found == ".gz":
        return gzip.open(path, "rb")
    if found:
        return io.BufferedReader(_FrameStream(path, DECOMPRESSORS[found]), CONTENT_BLOCK_BYTES)
    return open(path, "rb")


class _FrameStream(io.RawIOBase):
    """The content of a compressed file of any number of frames.

    Raises EOFError if the last frame is cut off. What follows a frame must be another frame or zeros (padding):
    bz2.open and lzma.open would silently ignore anything else, such as a frame whose first bytes are damaged.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Decompressor]):
        self._decompressor = decompressor
        self._stream = open(path, "rb")  # noqa: SIM115 - closed with this stream
        self._frame: Decompressor | None = None
        self._compressed, self._content = b"", memoryview(b"")
        self._is_behind_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        target = memoryview(buffer)
        while not self._content and self._has_compressed():
            self._frame = frame = self._frame or self._decompressor()
            self._is_behind_frame = False
            self._content = memoryview(frame.decompress(self._compressed))
            self._compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                self._frame, self._is_behind_frame = None, True
        length = min(len(target), len(self._content))
        target[:length] = self._content[:length]
        self._content = self._content[length:]
        return length

    def _has_compressed(self) -> bool:
        """Whether any compressed data is left; reads some, and skips padding."""
        while block := self._compressed or self._stream.read(COMPRESSED_BLOCK_BYTES):
            self._compressed = block.lstrip(b"\0") if self._is_behind_frame else block
            if self._compressed:
                return True
        if self._frame:
            raise EOFError("it ends within a frame")
        return False

    def close(self) -> None:
        self._stream.close()
        super().close()
