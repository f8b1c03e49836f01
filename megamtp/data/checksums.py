"""Checksums of a corpus: PREFIX.crc has the CRC-32 of each 4 KiB of PREFIX.bin. Training refuses damaged tokens.

Megatron-LM's programs neither write nor read this file. Its content, little-endian:

    8 bytes            magic "MEGAMTPC"
    uint32             version, 1
    uint32             bytes in a block, 4096
    uint64             bytes in PREFIX.bin
    uint32 [blocks]    CRC-32 (zlib) of each block; the last block may be shorter

A block is one page of memory, so checking the tokens that are read causes no additional disk reads. A check takes a few
microseconds per window, so blocks are checked at every read.
"""

import struct
import zlib
from array import array
from pathlib import Path

import numpy as np

from megamtp.errors import InputError

MAGIC = b"MEGAMTPC"
VERSION = 1
HEADER = struct.Struct("<8sIIQ")
BLOCK_BYTES = 4096


class ChecksumWriter:
    """Computes the content of a .crc file from the bytes of the .bin file, in pieces of any size."""

    def __init__(self) -> None:
        self._checksums, self._num_bytes = array("I"), 0

    def add(self, content: memoryview) -> None:
        """Adds the next bytes of the .bin file (a memoryview of format B)."""
        offset = 0
        while offset < len(content):
            block_fill = self._num_bytes % BLOCK_BYTES
            if block_fill == 0:
                self._checksums.append(0)
            piece = content[offset : offset + BLOCK_BYTES - block_fill]
            self._checksums[-1] = zlib.crc32(piece, self._checksums[-1])
            self._num_bytes += len(piece)
            offset += len(piece)

    def file_content(self) -> bytes:
        """Returns the header and the checksums of all bytes so far."""
        header = HEADER.pack(MAGIC, VERSION, BLOCK_BYTES, self._num_bytes)
        return header + np.array(self._checksums, dtype="<u4").tobytes()


class Checksums:
    """The memory-mapped checksums of a .bin file.

    Args:
        content: the bytes of the .bin file.

    Raises:
        InputError: the .crc file is damaged or belongs to a .bin file of another length.
    """

    def __init__(self, path: Path, content: memoryview):
        self._path, self._content = path, content
        try:
            with open(path, "rb") as stream:
                header = stream.read(HEADER.size)
            file = np.asarray(np.memmap(path, np.uint8, mode="r")) if header else np.empty(0, np.uint8)
        except OSError as error:
            raise self._bad_file(error.strerror or str(error)) from error
        if not header.startswith(MAGIC) or len(header) < HEADER.size:
            raise self._bad_file(f"it begins with {header[: len(MAGIC)]!r} and has {len(file)} bytes")
        _, version, self._block_bytes, num_bytes = HEADER.unpack(header)
        if version != VERSION or self._block_bytes < 1:
            raise self._bad_file(f"version {version} and blocks of {self._block_bytes} bytes")
        if num_bytes != len(content):
            name = path.with_suffix(".bin").name
            raise self._bad_file(f"it was written for {num_bytes} bytes, but {name} has {len(content)}")
        num_blocks = -(-num_bytes // self._block_bytes)
        if len(file) != HEADER.size + 4 * num_blocks:
            raise self._bad_file(f"{len(file)} bytes, but its header says {HEADER.size + 4 * num_blocks}")
        self._expected = file[HEADER.size :].view("<u4")

    def find_damage(self, start: int, stop: int) -> tuple[int, int] | None:
        """Returns (first byte, end) of the first damaged block with bytes in [start, stop), or None."""
        size = self._block_bytes
        for block in range(start // size, -(-stop // size)):
            if zlib.crc32(self._content[block * size : (block + 1) * size]) != self._expected[block]:
                return block * size, min((block + 1) * size, len(self._content))
        return None

    def _bad_file(self, problem: str) -> InputError:
        name = self._path.with_suffix(".bin").name
        return InputError(
            f"{self._path}: {problem}; expected the checksums of {name}: make both again (prepare_data --overwrite), "
            f"or remove it if another program wrote {name}"
        )
