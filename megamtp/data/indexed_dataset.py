"""Token files in Megatron's format: PREFIX.bin holds every token in a row, PREFIX.idx says where the documents are.

Either side can read the other's files. The index, little-endian:

    9 bytes  magic "MMIDIDX", two zero bytes      int32 [sequences]    lengths, in tokens
    uint64   version, 1                           int64 [sequences]    where each begins in PREFIX.bin, in bytes
    uint8    code of the token type, see DTYPES   int64 [documents+1]  first sequence of each document, then the number
    uint64   number of sequences                                       of sequences
    uint64   number of documents, plus 1

We write one sequence per document, and read any number. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import os
import struct
from array import array
from pathlib import Path

import numpy as np

from megamtp.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name).newbyteorder("<") for code, name in enumerate(["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"], start=1)
}


def best_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that Megatron, too, would choose for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def _paths(prefix: Path | str) -> tuple[Path, Path]:
    """The .bin and .idx path of a prefix, which may already carry either suffix."""
    stem = str(prefix).removesuffix(".bin").removesuffix(".idx")
    return Path(stem + ".bin"), Path(stem + ".idx")


class IndexedDatasetWriter:
    """Context manager that writes PREFIX.bin and .idx under temporary names and publishes them only on a clean exit.

    The .idx comes last and an old one goes first, so a run killed at any time leaves no pair that looks whole.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype | type):
        self.dtype = np.dtype(dtype)
        self._bin_path, self._idx_path = _paths(prefix)
        self._partial_bin, self._partial_idx = (Path(f"{path}.partial") for path in _paths(prefix))
        self._lengths = array("i")

    def __enter__(self) -> "IndexedDatasetWriter":
        self._stream = open(self._partial_bin, "wb")
        return self

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Appends one document. Raises InputError if a token does not fit the type of the file."""
        tokens = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise InputError(
                f"found token ids {tokens.min()} to {tokens.max()}, expected {limits.min} to {limits.max} "
                f"for {self.dtype.name}: choose the type with best_dtype"
            )
        self._stream.write(tokens.astype(self.dtype.newbyteorder("<")).tobytes())
        self._lengths.append(tokens.size)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents that lie in a row: `tokens` of the file's type [sum of lengths], `lengths` [documents]."""
        self._stream.write(tokens.astype(self.dtype.newbyteorder("<"), copy=False).data)
        self._lengths.extend(lengths.tolist())

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self._publish()
        finally:
            self._partial_bin.unlink(missing_ok=True)
            self._partial_idx.unlink(missing_ok=True)
            self._stream.close()  # last, since it raises if the disk is full

    def _publish(self) -> None:
        with open(self._partial_idx, "wb") as index:
            index.write(self._index_bytes())
            _flush_to_disk(index)
        _flush_to_disk(self._stream)
        self._idx_path.unlink(missing_ok=True)
        os.replace(self._partial_bin, self._bin_path)
        os.replace(self._partial_idx, self._idx_path)

    def _index_bytes(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * self.dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype.newbyteorder("<"))
        header = HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()


def _flush_to_disk(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class IndexedDataset:
    """Memory-mapped documents of PREFIX.bin and .idx: `len` documents, `dataset[i]` the tokens [length] of one.

    `document_lengths` int64 [documents] and `num_tokens` count tokens; `name` is the prefix, for messages. Raises InputError for
    files that are missing, truncated, of another format, or that contradict each other.
    """

    def __init__(self, prefix: Path | str):
        self._bin_path, self._idx_path = _paths(prefix)
        self.name = str(self._bin_path.with_suffix(""))
        self.dtype, lengths, pointers, documents = _read_index(self._idx_path)
        # Token offsets of the sequences; 64 bits, since a corpus may exceed 2**31 tokens.
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._check(lengths, pointers, documents, offsets)
        self._document_offsets = offsets[documents]
        self.document_lengths = np.diff(self._document_offsets)
        self.num_tokens = int(offsets[-1])
        self._tokens = self._map_tokens()

    def _check(self, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, offsets: np.ndarray) -> None:
        if (lengths < 0).any() or (pointers != offsets[:-1] * self.dtype.itemsize).any():
            raise _bad_file(self._idx_path, "lengths and pointers contradict each other")
        if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
            raise _bad_file(self._idx_path, "document numbers do not rise from 0 to the number of sequences")

    def _map_tokens(self) -> np.ndarray:
        expected_bytes = self.num_tokens * self.dtype.itemsize
        try:
            found_bytes = self._bin_path.stat().st_size
            if found_bytes != expected_bytes:
                raise _bad_file(self._bin_path, f"{found_bytes} bytes, but its index says {expected_bytes}")
            if self.num_tokens == 0:  # an empty file cannot be mapped
                return np.empty(0, self.dtype)
            return np.memmap(self._bin_path, self.dtype, mode="r")
        except OSError as error:
            raise _bad_file(self._bin_path, error.strerror) from error

    def __len__(self) -> int:
        return len(self.document_lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.tokens(self._document_offsets[document], self._document_offsets[document + 1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop of all documents in a row, a read-only view; short if `stop` lies past the end."""
        return self._tokens[start:stop]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The token type, and the index's three arrays, memory-mapped."""
    try:
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
        content = np.memmap(path, np.uint8, mode="r") if header else b""
    except OSError as error:
        raise _bad_file(path, error.strerror) from error
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


def _bad_file(path: Path, found: str) -> InputError:
    return InputError(f"{path}: {found}; expected whole .bin and .idx files of tokens: make them again (prepare_data --overwrite)")
