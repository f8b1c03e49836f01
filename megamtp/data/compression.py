"""Opens files that may be compressed, as .gz, .bz2, .xz or .zst.

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
    """Decompresses one frame (zstd's term; bzip2 and xz call it a stream)."""

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
    """Returns the suffix of a compressed file, one of SUFFIXES, or None."""
    lower_case = path.suffix.lower()
    return lower_case if lower_case in SUFFIXES else None


def open_binary(path: Path) -> io.BufferedIOBase:
    """Opens the decompressed content of a file.

    Reading raises the decompression libraries' errors if the file is damaged, EOFError if it is truncated, and
    InputError if a library is not installed.
    """
    compression = suffix(path)
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression:
        return io.BufferedReader(_FrameStream(path, DECOMPRESSORS[compression]), CONTENT_BLOCK_BYTES)
    return open(path, "rb")


class _FrameStream(io.RawIOBase):
    """The decompressed content of a file with any number of frames.

    Only another frame or zeros (padding) may follow a frame. bz2.open and lzma.open would silently ignore anything
    else, such as a frame whose first bytes are damaged.

    Raises:
        EOFError: the last frame is truncated.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Decompressor]):
        self._decompressor = decompressor
        self._stream = open(path, "rb")  # noqa: SIM115 - closed with this stream
        self._frame: Decompressor | None = None
        self._compressed, self._content = b"", memoryview(b"")
        self._is_after_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        target = memoryview(buffer)
        while not self._content and self._has_compressed():
            self._frame = frame = self._frame or self._decompressor()
            self._is_after_frame = False
            self._content = memoryview(frame.decompress(self._compressed))
            self._compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                self._frame, self._is_after_frame = None, True
        length = min(len(target), len(self._content))
        target[:length] = self._content[:length]
        self._content = self._content[length:]
        return length

    def _has_compressed(self) -> bool:
        """Returns whether any compressed data is left. Reads some if needed, and skips padding."""
        while block := self._compressed or self._stream.read(COMPRESSED_BLOCK_BYTES):
            self._compressed = block.lstrip(b"\0") if self._is_after_frame else block
            if self._compressed:
                return True
        if self._frame:
            raise EOFError("it ends within a frame")
        return False

    def close(self) -> None:
        self._stream.close()
        super().close()
