"""Token files: the bytes of Megatron-LM's format, refusal of bad files, and interrupted writers."""

import os
import struct
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.indexed_dataset import HEADER, IndexedDataset, IndexedDatasetWriter, best_dtype
from megamtp.errors import InputError

# The type codes of the format and the same types in the struct module.
CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}
INTEGERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# The documents [5, 65499], [] and [258] as uint16.
DOCUMENTS = [[5, 65499], [], [258]]
BIN = bytes.fromhex("0500 dbff 0201")
IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"
    "02000000 00000000 01000000"
    "0000000000000000 0400000000000000 0400000000000000"
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
)


def encode(code: int, sequences: list[list], documents: list[int]) -> tuple[bytes, bytes]:
    """Returns the .bin and .idx of `sequences`. `documents`: the first sequence of each document, then the number."""
    content = b"".join(struct.pack(f"<{len(tokens)}{CODES[code]}", *tokens) for tokens in sequences)
    lengths = [len(tokens) for tokens in sequences]
    pointers = [sum(lengths[:number]) * struct.calcsize(f"<{CODES[code]}") for number in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i{len(lengths)}q", *lengths, *pointers)
    return content, index + struct.pack(f"<{len(documents)}q", *documents)


def write_pair(prefix: Path, content: bytes, index: bytes) -> Path:
    Path(f"{prefix}.bin").write_bytes(content)
    Path(f"{prefix}.idx").write_bytes(index)
    return prefix


def write(prefix: Path, documents: list, dtype=np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
    return prefix


def read(prefix: Path) -> list[list]:
    return [tokens.tolist() for tokens in IndexedDataset(prefix)]


def refusal(prefix: Path) -> str:
    with pytest.raises(InputError) as error:
        IndexedDataset(prefix)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_handwritten_bytes_are_read(tmp_path):
    dataset = IndexedDataset(write_pair(tmp_path / "by.hand", BIN, IDX))
    assert [tokens.tolist() for tokens in dataset] == DOCUMENTS
    assert [dataset.document_start(document) for document in range(4)] == [0, 2, 2, 3]
    assert (len(dataset), dataset.num_tokens, dataset.dtype) == (3, 3, np.uint16)
    assert dataset.name == str(tmp_path / "by.hand")


def test_written_bytes_equal_handwritten_bytes(tmp_path):
    write(tmp_path / "corpus", DOCUMENTS)
    assert (tmp_path / "corpus.bin").read_bytes() == BIN
    assert (tmp_path / "corpus.idx").read_bytes() == IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.crc", "corpus.idx"]


@pytest.mark.parametrize("code", CODES)
def test_every_type_is_read(tmp_path, code):
    dataset = IndexedDataset(write_pair(tmp_path / "typed", *encode(code, [[1, 127], [], [3]], [0, 1, 2, 3])))
    assert [tokens.tolist() for tokens in dataset] == [[1, 127], [], [3]]
    assert dataset.dtype == np.dtype(CODES[code])


@pytest.mark.parametrize("code", INTEGERS)
def test_extreme_values_survive_a_round_trip(tmp_path, code):
    limits = np.iinfo(INTEGERS[code])
    documents = [[limits.min, limits.max], [], [0]]
    write(tmp_path / "corpus", documents, INTEGERS[code])
    assert read(tmp_path / "corpus") == documents
    assert ((tmp_path / "corpus.bin").read_bytes(), (tmp_path / "corpus.idx").read_bytes()) == encode(
        code, documents, [0, 1, 2, 3]
    )


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=6))
def test_files_equal_those_of_an_independent_writer(tmp_path_factory, documents):
    prefix = write(tmp_path_factory.getbasetemp() / "property", documents)
    written = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    assert written == encode(8, documents, list(range(len(documents) + 1)))
    dataset = IndexedDataset(prefix)
    assert [tokens.tolist() for tokens in dataset] == documents
    assert dataset.tokens(0, dataset.num_tokens).tolist() == [token for tokens in documents for token in tokens]


def test_documents_of_several_sequences(tmp_path):
    sequences = [[1, 2], [3], [], [4, 5, 6]]
    dataset = IndexedDataset(write_pair(tmp_path / "several", *encode(4, sequences, [0, 2, 2, 4])))
    assert [tokens.tolist() for tokens in dataset] == [[1, 2, 3], [], [4, 5, 6]]
    assert [dataset.document_start(document) for document in range(4)] == [0, 3, 3, 6]


def test_reading_ranges_of_tokens_and_documents(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "corpus", [[1, 2], [3, 4, 5]]))
    assert dataset.tokens(1, 4).tolist() == [2, 3, 4]
    assert dataset.tokens(4, 9).tolist() == [5]
    assert not dataset.tokens(0, 5).flags.writeable
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            dataset[outside]
    for suffix in (".bin", ".idx"):
        assert read(tmp_path / f"corpus{suffix}") == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", ["begins with b''"]),
        (b"something else altogether" * 9, ["MMIDIDX"]),
        (IDX[:20], ["20 of 34 bytes"]),
        (IDX + b"\x00", ["103 bytes", "says 102"]),
        (IDX[:9] + b"\x02" + IDX[10:], ["version 2"]),
        (IDX[:17] + b"\x00" + IDX[18:], ["type code 0"]),
        (IDX[:17] + b"\x09" + IDX[18:], ["type code 9"]),
        (IDX[:17] + b"\x04" + IDX[18:], ["inconsistent"]),  # offsets of 2-byte tokens with the type code of 4 bytes
        (IDX[:18] + b"\xff" * 8 + IDX[26:], ["102 bytes"]),
        (IDX[:26] + bytes(8) + IDX[34:70], ["no document numbers"]),
        (IDX[:34] + b"\xff\xff\xff\xff" + IDX[38:], ["inconsistent"]),
        (
            IDX[:38] + struct.pack("<2i3q", 2, -1, 0, 4, 8) + IDX[70:],
            ["inconsistent"],
        ),  # consistent except for a length of -1
        (IDX[:54] + b"\x02" + IDX[55:], ["inconsistent"]),
        (IDX[:70] + b"\x01" + IDX[71:], ["document numbers"]),
        (IDX[:78] + b"\x03" + IDX[79:], ["document numbers"]),
        (IDX[:94] + b"\x02" + IDX[95:], ["document numbers"]),
        (IDX[:94] + b"\x04" + IDX[95:], ["document numbers"]),
    ],
)
def test_bad_index_is_refused(tmp_path, index, words):
    message = refusal(write_pair(tmp_path / "bad", BIN, index))
    assert message.startswith(f"{tmp_path}/bad.idx: ")
    assert all(word in message for word in words), message


def test_index_truncated_at_any_byte_is_refused(tmp_path):
    for length in range(len(IDX)):
        assert f"{tmp_path}/cut.idx: " in refusal(write_pair(tmp_path / "cut", BIN, IDX[:length]))


@pytest.mark.parametrize("content", [b"", BIN[:-1], BIN + b"\x00"])
def test_bin_of_another_size_than_the_index_says_is_refused(tmp_path, content):
    assert refusal(write_pair(tmp_path / "bad", content, IDX)).startswith(f"{tmp_path}/bad.bin: {len(content)} bytes, ")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(tmp_path, suffix):
    write_pair(tmp_path / "half", BIN, IDX)
    (tmp_path / f"half{suffix}").unlink()
    assert refusal(tmp_path / "half").startswith(f"{tmp_path}/half{suffix}: No such file")


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, -1), (np.uint16, 65536), (np.int32, 2**31), (np.uint8, 256)])
def test_token_out_of_range_leaves_no_files(tmp_path, dtype, token):
    with pytest.raises(InputError, match=rf"^found token ids .*{token}.*; expected .*{np.dtype(dtype).name}.*$"):
        write(tmp_path / "bad", [[1], [1, token]], dtype)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8), data=st.data())
def test_boundaries_are_where_documents_begin(tmp_path_factory, lengths, data):
    prefix = write(tmp_path_factory.getbasetemp() / "bounds", [[7] * length for length in lengths])
    dataset, starts = IndexedDataset(prefix), np.cumsum([0, *lengths])
    if dataset.num_tokens == 0:
        return
    start = data.draw(st.integers(0, dataset.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, dataset.num_tokens))
    own = [(begin, begin + length) for begin, length in zip(starts.tolist(), lengths, strict=False) if length]
    assert dataset.boundaries(start, stop).tolist() == [begin for begin, _ in own if start < begin < stop]
    document = dataset.document_at(start)
    assert dataset.document_start(document) <= start < dataset.document_start(document + 1)


def test_damage_between_the_ends_is_detected_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megamtp.data.indexed_dataset.CHECKED_SEQUENCES", 2)
    content, index = encode(8, [[1, 2]] * 9, list(range(10)))
    pointers, documents = HEADER.size + 9 * 4, HEADER.size + 9 * 12
    for offset, value in (
        (pointers + 8 * 4, 3),
        (pointers + 8 * 4, 2**40),
        (documents + 8 * 4, 77),
        (documents + 8 * 4, -1),
    ):
        damaged = index[:offset] + struct.pack("<q", value) + index[offset + 8 :]
        dataset = IndexedDataset(write_pair(tmp_path / "damaged", content, damaged))
        for read_damage in (lambda dataset=dataset: dataset[4], lambda dataset=dataset: dataset.boundaries(6, 12)):
            with pytest.raises(InputError, match=rf"^{tmp_path}/damaged\.idx: .*; expected complete"):
                read_damage()


def test_flipped_bits_of_an_index_never_move_boundaries(tmp_path, monkeypatch):
    """For every fifth bit, boundaries are unchanged or the index is refused.

    The exception are document numbers that still increase: they cannot be detected.
    """
    monkeypatch.setattr("megamtp.data.indexed_dataset.CHECKED_SEQUENCES", 1)
    lengths = [2, 3, 0, 1, 4, 2, 2, 5, 1, 3, 2]
    content, index = encode(8, [[7] * length for length in lengths], list(range(12)))
    starts, first_number = {sum(lengths[:number]) for number in range(11)}, HEADER.size + 12 * len(lengths)
    refused = 0
    for bit in range(8 * HEADER.size, 8 * len(index), 5):
        flipped = bytearray(index)
        flipped[bit // 8] ^= 1 << bit % 8
        write_pair(tmp_path / "flipped", content, flipped)
        numbers = struct.unpack("<12q", flipped[first_number:])
        if numbers != tuple(range(12)) and sorted(numbers) == list(numbers):
            continue
        try:
            dataset = IndexedDataset(tmp_path / "flipped")
            for start in range(0, 20, 4):
                expected = sorted(first for first in starts if start < first < start + 6)
                assert dataset.boundaries(start, start + 6).tolist() == expected
        except InputError:
            refused += 1
    assert refused > 320


class MegatronFiles:
    """The writer and the reader of megatron-core, which define the format."""

    def __init__(self):
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

        self.reader, self.builder = IndexedDataset, IndexedDatasetBuilder

    def write(self, prefix: Path, documents: list[list[list]], dtype: type) -> tuple[bytes, bytes]:
        """Writes documents, which are lists of sequences, and returns the bytes of the .bin and .idx files."""
        builder = self.builder(f"{prefix}.bin", dtype=dtype)
        for sequences in documents:
            tokens = np.array([token for sequence in sequences for token in sequence])
            builder.add_document(torch.from_numpy(tokens), [len(sequence) for sequence in sequences])
        builder.finalize(f"{prefix}.idx")
        return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()

    def read(self, prefix: Path) -> list[list[list]]:
        """Returns the documents that were given to `write`."""
        dataset = self.reader(str(prefix))
        documents = dataset.document_indices.tolist()
        return [[dataset[index].tolist() for index in range(*pair)] for pair in pairwise(documents)]


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about optional libraries that are not installed
        return MegatronFiles()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16])
def test_files_of_every_type_equal_those_of_megatron(tmp_path, megatron, dtype):
    low, high = (
        (np.finfo(dtype).min, 0.5) if np.dtype(dtype).kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    )
    documents = [[[1, 2, 3]], [[]], [], [[4], [], [5, 6]], [[float(low), 0.5] if dtype == np.float64 else [low, high]]]
    theirs = megatron.write(tmp_path / "theirs", documents, dtype)
    with IndexedDatasetWriter(tmp_path / "corpus", dtype) as writer:
        for sequences in documents:
            tokens = [token for sequence in sequences for token in sequence]
            writer.add_document(tokens, [len(sequence) for sequence in sequences])
    assert ((tmp_path / "corpus.bin").read_bytes(), (tmp_path / "corpus.idx").read_bytes()) == theirs
    assert megatron.read(tmp_path / "corpus") == documents
    assert read(tmp_path / "theirs") == [
        [token for sequence in sequences for token in sequence] for sequences in documents
    ]
    assert IndexedDataset(tmp_path / "theirs").dtype == dtype


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=4), max_size=3), min_size=1, max_size=6))
def test_files_of_any_documents_equal_those_of_megatron(tmp_path_factory, megatron, documents):
    folder = tmp_path_factory.getbasetemp()
    theirs = megatron.write(folder / "their_property", documents, np.uint16)
    with IndexedDatasetWriter(folder / "our_property", np.uint16) as writer:
        for sequences in documents:
            writer.add_document(
                [token for sequence in sequences for token in sequence], [len(part) for part in sequences]
            )
    assert (Path(f"{folder}/our_property.bin").read_bytes(), Path(f"{folder}/our_property.idx").read_bytes()) == theirs
    if theirs[0]:  # megatron-core cannot map an empty .bin
        assert megatron.read(folder / "our_property") == documents
    assert read(folder / "their_property") == [
        [token for part in sequences for token in part] for sequences in documents
    ]


def test_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megamtp.data.indexed_dataset.LONGEST_SEQUENCE", 3)
    with pytest.raises(InputError, match=r"^found a document of 4 tokens; expected at most 3: split it$"):
        write(tmp_path / "bad", [[1, 2, 3], [1, 2, 3, 4]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_best_dtype(vocab_size, dtype):
    assert best_dtype(vocab_size) == dtype


@pytest.mark.parametrize("old", [[], [[9, 9]]])
@pytest.mark.parametrize(("function", "call"), [(name, call) for name in ("fsync", "replace") for call in range(3)])
def test_interrupted_writer_leaves_the_old_files_or_a_refused_pair(tmp_path, monkeypatch, old, function, call):
    if old:
        write(tmp_path / "corpus", old)
    original, calls = getattr(os, function), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(os, function, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "corpus", [[1, 2]])
    if old and function == "fsync":
        assert read(tmp_path / "corpus") == old
    else:
        refusal(tmp_path / "corpus")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("num_tokens", [3, 100_000])  # smaller and larger than the stream's buffer
def test_full_disk_leaves_no_files(tmp_path, num_tokens):
    (tmp_path / "corpus.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "corpus", [[1] * num_tokens])
    assert list(tmp_path.iterdir()) == []


def test_add_documents_writes_the_same_as_add_document(tmp_path):
    documents = [np.arange(length, dtype=np.uint16) for length in (3, 0, 1, 700)]
    with IndexedDatasetWriter(tmp_path / "single", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    with IndexedDatasetWriter(tmp_path / "row", np.uint16) as writer:
        writer.add_documents(documents[0], np.array([3]))
        writer.add_documents(np.concatenate(documents[1:]), np.array([0, 1, 700]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"row{suffix}").read_bytes() == (tmp_path / f"single{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "{0} is a folder; expected the prefix of a corpus's .bin and .idx files, such as {0}/half or"),
        ("/tran", "{0}/tran.bin and .idx: No such file or directory; expected the prefix of a corpus's"),
        ("/tran.idx", "{0}/tran.idx: No such file or directory; expected the prefix of a corpus's"),
        (f"/{'a' * 300}", "a.bin and .idx: No such file or directory; expected the prefix"),
        ("/train {0}/validation", "; several corpora need a weight each: WEIGHT PREFIX WEIGHT PREFIX ..."),
        ("/half", "{0}/half.bin: No such file or directory; expected readable .bin and .idx files: restore the file"),
        ("/other", "{0}/other.idx: Is a directory; expected readable .bin and .idx files"),
    ],
)
def test_misspelt_prefix_is_not_reported_as_damage(name, words, tmp_path):
    for prefix in ("train", "validation", "half"):
        with IndexedDatasetWriter(tmp_path / prefix, np.uint16) as writer:
            writer.add_document([1, 2])
    (tmp_path / "half.bin").unlink()
    (tmp_path / "other.idx").mkdir()
    with pytest.raises(InputError) as error:
        IndexedDataset(f"{tmp_path}{name.format(tmp_path)}")
    assert words.format(tmp_path) in str(error.value)
    assert "prepare the corpus again" not in str(error.value)
