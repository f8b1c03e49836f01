"""PREFIX.crc: a CRC-32 of every 4 KiB of PREFIX.bin, by which a flipped bit is found before a step trains on it.

Megatron's programs neither write nor need it. Little-endian:

    8 bytes  magic "MEGAMTPC"                     uint32 [blocks]      zlib's CRC-32 of each block; the last may be
    shorter
    uint32   version, 1
    uint32   bytes of a block
    uint64   bytes of PREFIX.bin

A block is a page of memory, so that checking what is read takes no more of the .bin from the disk than reading it. It
takes some microseconds a window: blocks are checked whenever they are read, and no list of checked ones is kept.
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
    """Takes a .bin piece by piece; `file` is the .crc's content, the same whatever the pieces were."""

    def __init__(self) -> None:
        self._checksums, self._num_bytes = array("I"), 0

    def add(self, content: memoryview) -> None:
        """Goes on with bytes (a memoryview of format B)."""
        place = 0
        while place < len(content):
            filled = self._num_bytes % BLOCK_BYTES
            if filled == 0:
                self._checksums.append(0)
            piece = content[place : place + BLOCK_BYTES - filled]
            self._checksums[-1] = zlib.crc32(piece, self._checksums[-1])
            self._num_bytes += len(piece)
            place += len(piece)

    def file(self) -> bytes:
        """Header and checksums."""
        return (
            HEADER.pack(MAGIC, VERSION, BLOCK_BYTES, self._num_bytes) + np.array(self._checksums, dtype="<u4").tobytes()
        )


class Checksums:
    """The memory-mapped checksums of a .bin. Raises InputError: the .crc is damaged, or of a .bin of another length.

    Args:
        content: of the .bin, as bytes.
    """

    def __init__(self, path: Path, content: memoryview):
        self._path, self._content = path, content
        try:
            with open(path, "rb") as stream:
                header = stream.read(HEADER.size)
            found = np.asarray(np.memmap(path, np.uint8, mode="r")) if header else np.empty(0, np.uint8)
        except OSError as error:
            raise self._bad_file(error.strerror or str(error)) from error
        if not header.startswith(MAGIC) or len(header) < HEADER.size:
            raise self._bad_file(f"it begins with {header[: len(MAGIC)]!r} and has {len(found)} bytes")
        _, version, self._block_bytes, num_bytes = HEADER.unpack(header)
        if version != VERSION or self._block_bytes < 1:
            raise self._bad_file(f"version {version} and blocks of {self._block_bytes} bytes")
        if num_bytes != len(content):
            raise self._bad_file(f"it is of {num_bytes} bytes, and {path.with_suffix('.bin').name} has {len(content)}")
        num_blocks = -(-num_bytes // self._block_bytes)
        if len(found) != HEADER.size + 4 * num_blocks:
            raise self._bad_file(f"{len(found)} bytes, but its header says {HEADER.size + 4 * num_blocks}")
        self._expected = found[HEADER.size :].view("<u4")

    def damaged(self, start: int, stop: int) -> tuple[int, int] | None:
        """Where the first block of those that hold bytes start .. stop begins and ends, whose checksum is another."""
        size = self._block_bytes
        for block in range(start // size, -(-stop // size)):
            if zlib.crc32(self._content[block * size : (block + 1) * size]) != self._expected[block]:
                return block * size, min((block + 1) * size, len(self._content))
        return None

    def _bad_file(self, found: str) -> InputError:
        name = self._path.with_suffix(".bin").name
        return InputError(
            f"{self._path}: {found}; expected the checksums of {name}: make both again (prepare_data --overwrite), or "
            f"remove it if {name} is another program's"
        )
