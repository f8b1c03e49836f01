"""Checksums: the .crc byte by byte, every flipped bit found where it is read, and which files are refused."""

import shutil
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.checksums import BLOCK_BYTES, ChecksumWriter
from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.errors import InputError

TOKENS = np.random.default_rng(0).integers(400, size=5000, dtype=np.uint16)  # two blocks and a part of one


def write(prefix: Path, documents: list[np.ndarray]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_document(tokens)
    return prefix


def flip(path: Path, byte: int) -> None:
    """Its lowest bit."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_literal_bytes(tmp_path):
    write(tmp_path / "ours", [TOKENS[:7], TOKENS[7:]])
    content = TOKENS.tobytes()
    expected = struct.pack("<8sIIQ", b"MEGAMTPC", 1, 4096, 10_000)
    expected += struct.pack("<3I", *(zlib.crc32(content[first : first + 4096]) for first in (0, 4096, 8192)))
    assert (tmp_path / "ours.bin").read_bytes() == content
    assert (tmp_path / "ours.crc").read_bytes() == expected


@settings(max_examples=50, deadline=None)
@given(
    st.binary(max_size=40), st.integers(0, 2 * BLOCK_BYTES), st.lists(st.integers(0, 2 * BLOCK_BYTES + 40), max_size=6)
)
def test_pieces_change_nothing(start, more, cuts):
    content = start + bytes(more)
    whole, pieces = ChecksumWriter(), ChecksumWriter()
    whole.add(memoryview(content))
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for first, stop in pairwise(edges):
        pieces.add(memoryview(content[first:stop]))
    assert pieces.file() == whole.file()
    blocks = [content[first : first + BLOCK_BYTES] for first in range(0, len(content), BLOCK_BYTES)]
    assert whole.file()[24:] == b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


@pytest.mark.parametrize(
    ("byte", "block", "documents"),
    [
        (0, (0, 4096), "document 0"),
        (4095, (0, 4096), "document 0"),
        (4096, (4096, 8192), "documents 0 to 2"),
        (9999, (8192, 10_000), "document 2"),
    ],
)
def test_flipped_bit_is_found_where_it_is_read(tmp_path, byte, block, documents):
    """Document 1 is empty."""
    prefix = write(tmp_path / "flipped", [TOKENS[:3000], TOKENS[:0], TOKENS[3000:]])
    flip(tmp_path / "flipped.bin", byte)
    dataset = IndexedDataset(prefix)
    words = (
        rf"^{prefix}\.bin: bytes {block[0]} to {block[1]}, in {documents}, have another checksum .*; expected .*: "
        rf"copy .*$"
    )
    first, stop = block[0] // 2, block[1] // 2
    for start, end in ((byte // 2, byte // 2 + 1), (first, first + 1), (stop - 1, stop), (0, 5000)):
        with pytest.raises(InputError, match=words):
            dataset.tokens(start, end)
    for other in {0, 2048, 4096} - {first}:
        assert dataset.tokens(other, other + 900).tolist() == TOKENS[other : other + 900].tolist()
    with pytest.raises(InputError, match=words):
        list(dataset)


def test_flipped_bit_of_a_checksum_is_found_too(tmp_path):
    prefix = write(tmp_path / "flipped", [TOKENS])
    flip(tmp_path / "flipped.crc", 28)
    assert IndexedDataset(prefix).tokens(0, 2048).tolist() == TOKENS[:2048].tolist()
    with pytest.raises(InputError, match="bytes 4096 to 8192, in document 0, have another checksum"):
        IndexedDataset(prefix).tokens(2048, 2049)


def test_without_checksums_tokens_are_taken_as_they_are(tmp_path):
    prefix = write(tmp_path / "flipped", [TOKENS])
    flip(tmp_path / "flipped.bin", 0)
    (tmp_path / "flipped.crc").unlink()
    assert IndexedDataset(prefix).tokens(0, 5000).tolist() == [TOKENS[0] ^ 1, *TOKENS[1:].tolist()]


def test_corpus_without_tokens(tmp_path):
    prefix = write(tmp_path / "empty", [TOKENS[:0]])
    assert (tmp_path / "empty.crc").stat().st_size == 24
    assert IndexedDataset(prefix).tokens(0, 10).tolist() == []


WHOLE = struct.pack("<8sIIQ3I", b"MEGAMTPC", 1, 4096, 10_000, 1, 2, 3)
BAD = {
    "empty": (b"", ["begins with b''", "0 bytes"]),
    "another format": (b"something else altogether", ["begins with b'somethin'"]),
    "cut header": (WHOLE[:23], ["begins with b'MEGAMTPC' and has 23 bytes"]),
    "newer version": (struct.pack("<8sIIQ", b"MEGAMTPC", 2, 4096, 10_000), ["version 2"]),
    "no block": (struct.pack("<8sIIQ", b"MEGAMTPC", 1, 0, 10_000), ["blocks of 0 bytes"]),
    "cut": (WHOLE[:-1], ["35 bytes, but its header says 36"]),
    "too long": (WHOLE + b"\0", ["37 bytes, but its header says 36"]),
    "of another .bin": (
        struct.pack("<8sIIQ3I", b"MEGAMTPC", 1, 4096, 10_002, 1, 2, 3),
        ["of 10002 bytes", "of.bin has 10000"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_when_it_is_opened(tmp_path, case):
    content, words = BAD[case]
    prefix = write(tmp_path / "of", [TOKENS])
    (tmp_path / "of.crc").write_bytes(content)
    with pytest.raises(InputError) as error:
        IndexedDataset(prefix)
    message = str(error.value)
    assert message.startswith(f"{prefix}.crc: ") and "\n" not in message
    assert all(word in message for word in [*words, "; expected the checksums of of.bin: ", "remove it if"]), message


def test_folder_in_its_place(tmp_path):
    prefix = write(tmp_path / "of", [TOKENS])
    (tmp_path / "of.crc").unlink()
    (tmp_path / "of.crc").mkdir()
    with pytest.raises(InputError, match=r"of\.crc: Is a directory; expected the checksums"):
        IndexedDataset(prefix)


def test_checksums_of_another_corpus_of_the_same_length(tmp_path):
    prefix = write(tmp_path / "of", [TOKENS])
    write(tmp_path / "other", [TOKENS[::-1]])
    shutil.copy(tmp_path / "other.crc", tmp_path / "of.crc")
    with pytest.raises(InputError, match="bytes 0 to 4096, in document 0, have another checksum"):
        IndexedDataset(prefix).tokens(0, 1)
