"""Checksums: the bytes of the .crc file, detection of flipped bits, and refusal of bad .crc files."""

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

TOKENS = np.random.default_rng(0).integers(400, size=5000, dtype=np.uint16)  # two whole blocks and part of a third


def write(prefix: Path, documents: list[np.ndarray]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_document(tokens)
    return prefix


def flip(path: Path, byte: int) -> None:
    """Flips the lowest bit of a byte."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_bytes_of_the_file(tmp_path):
    write(tmp_path / "corpus", [TOKENS[:7], TOKENS[7:]])
    content = TOKENS.tobytes()
    expected = struct.pack("<8sIIQ", b"MEGAMTPC", 1, 4096, 10_000)
    expected += struct.pack("<3I", *(zlib.crc32(content[first : first + 4096]) for first in (0, 4096, 8192)))
    assert (tmp_path / "corpus.bin").read_bytes() == content
    assert (tmp_path / "corpus.crc").read_bytes() == expected


@settings(max_examples=50, deadline=None)
@given(
    st.binary(max_size=40), st.integers(0, 2 * BLOCK_BYTES), st.lists(st.integers(0, 2 * BLOCK_BYTES + 40), max_size=6)
)
def test_checksums_do_not_depend_on_pieces(start, num_zeros, cuts):
    content = start + bytes(num_zeros)
    whole, pieces = ChecksumWriter(), ChecksumWriter()
    whole.add(memoryview(content))
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for first, stop in pairwise(edges):
        pieces.add(memoryview(content[first:stop]))
    assert pieces.file_content() == whole.file_content()
    blocks = [content[first : first + BLOCK_BYTES] for first in range(0, len(content), BLOCK_BYTES)]
    assert whole.file_content()[24:] == b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


@pytest.mark.parametrize(
    ("byte", "block", "documents"),
    [
        (0, (0, 4096), "document 0"),
        (4095, (0, 4096), "document 0"),
        (4096, (4096, 8192), "documents 0 to 2"),
        (9999, (8192, 10_000), "document 2"),
    ],
)
def test_flipped_bit_is_detected_where_it_is_read(tmp_path, byte, block, documents):
    """Reads three documents, of which the second is empty."""
    prefix = write(tmp_path / "flipped", [TOKENS[:3000], TOKENS[:0], TOKENS[3000:]])
    flip(tmp_path / "flipped.bin", byte)
    dataset = IndexedDataset(prefix)
    message = (
        rf"^{prefix}\.bin: the checksum of bytes {block[0]} to {block[1]}, in {documents}, differs from .*\.crc; "
        rf"expected .*: copy .*$"
    )
    first, stop = block[0] // 2, block[1] // 2
    for start, end in ((byte // 2, byte // 2 + 1), (first, first + 1), (stop - 1, stop), (0, 5000)):
        with pytest.raises(InputError, match=message):
            dataset.tokens(start, end)
    for other in {0, 2048, 4096} - {first}:
        assert dataset.tokens(other, other + 900).tolist() == TOKENS[other : other + 900].tolist()
    with pytest.raises(InputError, match=message):
        list(dataset)


def test_flipped_bit_of_a_checksum_is_detected(tmp_path):
    prefix = write(tmp_path / "flipped", [TOKENS])
    flip(tmp_path / "flipped.crc", 28)
    assert IndexedDataset(prefix).tokens(0, 2048).tolist() == TOKENS[:2048].tolist()
    with pytest.raises(InputError, match="the checksum of bytes 4096 to 8192, in document 0, differs"):
        IndexedDataset(prefix).tokens(2048, 2049)


def test_tokens_are_not_checked_without_a_crc_file(tmp_path):
    prefix = write(tmp_path / "flipped", [TOKENS])
    flip(tmp_path / "flipped.bin", 0)
    (tmp_path / "flipped.crc").unlink()
    assert IndexedDataset(prefix).tokens(0, 5000).tolist() == [TOKENS[0] ^ 1, *TOKENS[1:].tolist()]


def test_empty_corpus(tmp_path):
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
        ["for 10002 bytes", "corpus.bin has 10000"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_on_opening(tmp_path, case):
    content, words = BAD[case]
    prefix = write(tmp_path / "corpus", [TOKENS])
    (tmp_path / "corpus.crc").write_bytes(content)
    with pytest.raises(InputError) as error:
        IndexedDataset(prefix)
    message = str(error.value)
    assert message.startswith(f"{prefix}.crc: ") and "\n" not in message
    assert all(word in message for word in [*words, "; expected the checksums of corpus.bin: ", "remove it if"]), (
        message
    )


def test_folder_with_the_name_of_the_file_is_refused(tmp_path):
    prefix = write(tmp_path / "corpus", [TOKENS])
    (tmp_path / "corpus.crc").unlink()
    (tmp_path / "corpus.crc").mkdir()
    with pytest.raises(InputError, match=r"corpus\.crc: Is a directory; expected the checksums"):
        IndexedDataset(prefix)


def test_checksums_of_another_corpus_of_the_same_length(tmp_path):
    prefix = write(tmp_path / "corpus", [TOKENS])
    write(tmp_path / "other", [TOKENS[::-1]])
    shutil.copy(tmp_path / "other.crc", tmp_path / "corpus.crc")
    with pytest.raises(InputError, match="the checksum of bytes 0 to 4096, in document 0, differs"):
        IndexedDataset(prefix).tokens(0, 1)
