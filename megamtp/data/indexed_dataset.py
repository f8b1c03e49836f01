"""Reads and writes token files in Megatron-LM's format: PREFIX.bin holds all tokens, PREFIX.idx indexes the documents.

megamtp and Megatron-LM can read each other's files. The index, little-endian:

    9 bytes                magic "MMIDIDX", two zero bytes
    uint64                 version, 1
    uint8                  code of the token type, see DTYPES
    uint64                 number of sequences
    uint64                 number of documents, plus 1
    int32 [sequences]      lengths, in tokens
    int64 [sequences]      offset of each sequence in PREFIX.bin, in bytes
    int64 [documents + 1]  first sequence of each document, then the number of sequences

A document consists of any number of sequences; megamtp writes one sequence per document. megamtp also writes
PREFIX.crc (checksums.py). Without that file, tokens are not checked for damage.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import os
import struct
import zlib
from array import array
from bisect import bisect_right
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megamtp.data.checksums import Checksums, ChecksumWriter
from megamtp.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"], start=1)
}
LONGEST_SEQUENCE = 2**31 - 1  # tokens; lengths in the index are int32
INDEX_CHUNK_SEQUENCES = 1 << 20  # sequences per chunk while the index is written
END_TOKENS = 1 << 14  # tokens at each end of a corpus that crc32_of_ends reads
CHECKED_SEQUENCES = 1 << 16  # sequences at each end of the index that are checked when a dataset is opened


def best_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type for token ids below `vocab_size`, the same that Megatron-LM chooses."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def _paths(prefix: Path | str) -> tuple[Path, Path, Path]:
    """Returns the .bin, .idx and .crc paths of a prefix, which may already end in .bin or .idx."""
    stem = str(prefix).removesuffix(".bin").removesuffix(".idx")
    return Path(stem + ".bin"), Path(stem + ".idx"), Path(stem + ".crc")


class IndexedDatasetWriter:
    """Writes PREFIX.bin, .idx and .crc under temporary names, and renames them when its block ends without exception.

    The .idx file is removed first and appears last, so a process that is killed never leaves a mixture of old and new
    files that looks complete.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype | type):
        self.dtype = np.dtype(dtype)
        self._bin_path, self._idx_path, self._crc_path = _paths(prefix)
        self._partial_bin, self._partial_idx, self._partial_crc = (Path(f"{path}.partial") for path in _paths(prefix))
        self._lengths, self._documents, self._checksums = array("i"), array("q", [0]), ChecksumWriter()

    def __enter__(self) -> "IndexedDatasetWriter":
        self._stream = open(self._partial_bin, "wb")
        return self

    def add_document(self, tokens: np.ndarray | list[int], lengths: list[int] | None = None) -> None:
        """Appends one document, as one sequence or as sequences of `lengths` tokens.

        Raises:
            InputError: a token does not fit the type of the file, or a sequence exceeds LONGEST_SEQUENCE.
        """
        tokens = np.asarray(tokens)
        lengths = [tokens.size] if lengths is None else lengths
        assert sum(lengths) == tokens.size
        self._check(tokens, lengths)
        self._write(tokens)
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def _check(self, tokens: np.ndarray, lengths: list[int]) -> None:
        if self.dtype.kind != "f" and tokens.size:
            limits = np.iinfo(self.dtype)
            if not limits.min <= tokens.min() <= tokens.max() <= limits.max:
                raise InputError(
                    f"found token ids {tokens.min()} to {tokens.max()}; expected {limits.min} to {limits.max} "
                    f"for {self.dtype.name}: choose the type with best_dtype"
                )
        if max(lengths, default=0) > LONGEST_SEQUENCE:
            raise InputError(
                f"found a document of {max(lengths)} tokens; expected at most {LONGEST_SEQUENCE}: split it"
            )

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents of one sequence each: `tokens` [sum of lengths] of the file's type, int32 `lengths`."""
        self._write(tokens)
        first = len(self._lengths) + 1
        self._lengths.frombytes(lengths.astype(np.int32, copy=False).tobytes())
        self._documents.frombytes(np.arange(first, first + len(lengths), dtype=np.int64).tobytes())

    def _write(self, tokens: np.ndarray) -> None:
        content = np.ascontiguousarray(tokens, self.dtype.newbyteorder("<")).view(np.uint8).data
        self._stream.write(content)
        self._checksums.add(content)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error_type is None:
                self._publish()
        finally:
            self._partial_bin.unlink(missing_ok=True)
            self._partial_idx.unlink(missing_ok=True)
            self._partial_crc.unlink(missing_ok=True)
            self._stream.close()  # last, because it raises OSError if the disk is full

    def _publish(self) -> None:
        with open(self._partial_idx, "wb") as index:
            self._write_index(index)
            _flush_to_disk(index)
        with open(self._partial_crc, "wb") as checksums:
            checksums.write(self._checksums.file_content())
            _flush_to_disk(checksums)
        _flush_to_disk(self._stream)
        self._idx_path.unlink(missing_ok=True)
        os.replace(self._partial_bin, self._bin_path)
        os.replace(self._partial_crc, self._crc_path)
        os.replace(self._partial_idx, self._idx_path)

    def _write_index(self, index: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype.newbyteorder("<"))
        index.write(HEADER.pack(MAGIC, VERSION, code, len(self._lengths), len(self._documents)))
        lengths, offset = np.array(self._lengths, dtype="<i4"), 0
        index.write(lengths.data)
        for first in range(0, len(lengths), INDEX_CHUNK_SEQUENCES):
            ends = np.cumsum(lengths[first : first + INDEX_CHUNK_SEQUENCES], dtype=np.int64) + offset
            pointers = (ends - lengths[first : first + INDEX_CHUNK_SEQUENCES]) * self.dtype.itemsize
            index.write(pointers.astype("<i8").data)
            offset = int(ends[-1])
        index.write(np.array(self._documents, dtype="<i8").data)


def _flush_to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class IndexedDataset:
    """The memory-mapped documents of a corpus: dataset[i] returns the tokens [length] of document i.

    Opening a dataset checks only the two ends of the index, so it takes the same time for any size. The rest of the
    index is checked where it is read, and so are tokens if there is a .crc file.

    Attributes:
        name: the prefix, for messages.

    Raises:
        InputError: a file is missing, truncated or of another format, or the files are inconsistent.
    """

    def __init__(self, prefix: Path | str):
        self._bin_path, self._idx_path, crc_path = _paths(prefix)
        _check_prefix(str(prefix), self._bin_path, self._idx_path)
        self.name = str(self._bin_path.with_suffix(""))
        self.dtype, self._lengths, self._pointers, self._documents = _read_index(self._idx_path)
        self._check_ends()
        self.num_tokens = self._sequence_start(len(self._lengths))
        self._tokens = self._map_tokens()
        self._checksums = Checksums(crc_path, self._tokens.view(np.uint8).data) if crc_path.exists() else None

    def _check_ends(self) -> None:
        lengths, documents = self._lengths, self._documents
        if len(lengths) and self._pointers[0] != 0:
            raise _bad_file(self._idx_path, "its lengths and offsets are inconsistent")
        if documents[0] != 0 or documents[-1] != len(lengths):
            raise _bad_file(self._idx_path, "its document numbers do not increase from 0 to the number of sequences")
        for first in {0, max(0, len(lengths) - CHECKED_SEQUENCES)}:
            self._check_sequences(first, first + CHECKED_SEQUENCES)
        for first in {0, max(0, len(documents) - CHECKED_SEQUENCES)}:
            self._check_documents(first, first + CHECKED_SEQUENCES)

    def _check_sequences(self, first: int, stop: int) -> None:
        lengths, pointers = self._lengths[first:stop].astype(np.int64), self._pointers[first : stop + 1]
        ends = pointers[: len(lengths)] + lengths * self.dtype.itemsize
        if (lengths < 0).any() or (ends[: len(pointers) - 1] != pointers[1:]).any():
            raise _bad_file(self._idx_path, "its lengths and offsets are inconsistent")

    def _check_documents(self, first: int, stop: int) -> None:
        documents = self._documents[first:stop]
        if (documents < 0).any() or (documents > len(self._lengths)).any() or (np.diff(documents) < 0).any():
            raise _bad_file(self._idx_path, "its document numbers do not increase from 0 to the number of sequences")

    def _sequence_start(self, sequence: int) -> int:
        """Returns the number of tokens before a sequence. If it is the number of sequences: that of all tokens."""
        if sequence < len(self._lengths):
            return int(self._pointers[sequence]) // self.dtype.itemsize
        return int(self._pointers[-1]) // self.dtype.itemsize + int(self._lengths[-1]) if sequence else 0

    def _map_tokens(self) -> np.ndarray:
        expected_bytes = self.num_tokens * self.dtype.itemsize
        try:
            num_bytes = self._bin_path.stat().st_size
            if num_bytes != expected_bytes:
                raise _bad_file(self._bin_path, f"{num_bytes} bytes, but its index says {expected_bytes}")
            if self.num_tokens == 0:  # an empty file cannot be mapped
                return np.empty(0, self.dtype)
            # Slices of a plain array are cheaper than slices of a memmap.
            return np.asarray(np.memmap(self._bin_path, self.dtype, mode="r"))
        except OSError as error:
            raise _unreadable(self._bin_path, error) from None

    def __len__(self) -> int:
        return len(self._documents) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        self._check_documents(document, document + 2)
        self._check_sequences(max(0, int(self._documents[document]) - 1), int(self._documents[document + 1]))
        return self.tokens(self.document_start(document), self.document_start(document + 1))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Returns a read-only view of tokens [start, stop) of the concatenated documents. `stop` may exceed the end.

        Raises:
            InputError: the tokens do not match their checksums.
        """
        if self._checksums:
            self._check_content(self._checksums, start, min(stop, self.num_tokens))
        return self._tokens[start:stop]

    def crc32_of_ends(self) -> int:
        """Returns the CRC-32 of the first and last 16 Ki tokens, which identifies a corpus.

        Raises:
            InputError: the tokens do not match their checksums.
        """
        first = self.tokens(0, END_TOKENS)
        last = self.tokens(max(0, self.num_tokens - END_TOKENS), self.num_tokens)
        return zlib.crc32(last.tobytes(), zlib.crc32(first.tobytes()))

    def _check_content(self, checksums: Checksums, start: int, stop: int) -> None:
        size = self.dtype.itemsize
        damage = checksums.find_damage(start * size, stop * size)
        if damage:
            begin, end = damage
            first, last = self.document_at(begin // size), self.document_at((end - 1) // size)
            documents = f"document {first}" if first == last else f"documents {first} to {last}"
            raise InputError(
                f"{self._bin_path}: the checksum of bytes {begin} to {end}, in {documents}, differs from "
                f"{self.name}.crc; expected undamaged tokens: copy the corpus again, or prepare it again "
                "(prepare_data --overwrite)"
            )

    def document_start(self, document: int) -> int:
        """Returns the number of tokens before a document. If it is the number of documents: that of all tokens."""
        sequence = int(self._documents[document])
        if not 0 <= sequence <= len(self._lengths):
            raise _bad_file(
                self._idx_path, f"document {document} begins at sequence {sequence} of {len(self._lengths)}"
            )
        return self._sequence_start(sequence)

    def document_at(self, token: int) -> int:
        """Returns the document that holds the token at this position, found by bisection."""
        return bisect_right(self._documents, self._sequence_at(token)) - 1

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """Returns the positions in (start, stop) at which a document begins, int64, sorted and unique.

        Raises:
            InputError: the index is inconsistent there.
        """
        first_sequence, last_sequence = self._sequence_at(start), self._sequence_at(stop - 1)
        self._check_sequences(first_sequence, last_sequence + 1)
        first, last = (bisect_right(self._documents, sequence) for sequence in (first_sequence, last_sequence))
        # Also check one entry on each side: a wrong entry can lead the bisection to a wrong position.
        self._check_documents(max(0, first - 2), last + 2)
        return np.unique(self._pointers[self._documents[first:last]] // self.dtype.itemsize)

    def _sequence_at(self, token: int) -> int:
        return bisect_right(range(len(self._lengths)), token, key=self._sequence_start) - 1


def _check_prefix(prefix: str, bin_path: Path, idx_path: Path) -> None:
    """Raises InputError if a prefix names no files, because it is then probably misspelt."""
    # Path.exists would raise OSError for a name that is too long.
    if os.path.exists(bin_path) or os.path.exists(idx_path):
        return
    folder = Path(prefix) if os.path.isdir(prefix) else Path(prefix).parent
    try:
        present = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    except OSError:
        present = []
    if os.path.isdir(prefix):
        problem = f"{prefix} is a folder"
    elif prefix.endswith((".bin", ".idx")):
        problem = f"{prefix}: No such file or directory"
    else:
        problem = f"{prefix}.bin and .idx: No such file or directory"
    examples = f", such as {' or '.join(map(str, present[:3]))}" if present else ""
    several = "; several corpora need a weight each: WEIGHT PREFIX WEIGHT PREFIX ..." if len(prefix.split()) > 1 else ""
    raise InputError(f"{problem}; expected the prefix of a corpus's .bin and .idx files{examples}{several}")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the token type and the memory-mapped lengths, offsets and document numbers of an index."""
    try:
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
        content = np.asarray(np.memmap(path, np.uint8, mode="r")) if header else b""
    except OSError as error:
        raise _unreadable(path, error) from None
    if not header.startswith(MAGIC):
        raise _bad_file(path, f"it begins with {header[:9]!r}, not {MAGIC!r}")
    if len(header) < HEADER.size:
        raise _bad_file(path, f"its header has {len(header)} of {HEADER.size} bytes")
    _, version, code, num_sequences, num_documents = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise _bad_file(path, f"version {version} and type code {code}, not version {VERSION} and a code 1 to 8")
    sections = [HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_documents]
    if num_documents == 0:
        raise _bad_file(path, "its header says that it has no document numbers")
    if len(content) != sum(sections):
        raise _bad_file(path, f"{len(content)} bytes, but its header says {sum(sections)}")
    lengths, pointers, documents = np.split(content, np.cumsum(sections))[1:4]
    return DTYPES[code], lengths.view("<i4"), pointers.view("<i8"), documents.view("<i8")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: {error.strerror}; expected readable .bin and .idx files: restore the file or its permissions"
    )


def _bad_file(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: {problem}; expected complete .bin and .idx files: prepare the corpus again (prepare_data --overwrite)"
    )
